"""Which build variant of a local kernel folder the kernels library would load here.

A folder may be a kernel repository, its `build` folder, or one variant. A variant's name says what
it was built for: torch213-cxx11-cu130-x86_64-linux, torch-stable-abi29-..., torch-cpu.
Source: resolver.py and variants.py of kernels 0.17.2 (2026-11-21).
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from attnimg.facts import Vendor

_COMPILED = re.compile(
    r"(?P<kind>torch-stable-abi|torch|tvm-ffi)(?P<version>\d\d+)(?:-cxx(?:11|98))?"
    r"-(?P<backend>[a-z]+\d*)-(?P<cpu>\w+)-(?P<os>\w+)"
)
_PURE_PYTHON = re.compile(r"torch-(?P<backend>[a-z]+)")
# What is preferred where several fit.
_ORDER = ("torch-stable-abi", "torch", "tvm-ffi", "pure python")
_FIELDS: dict[str, Vendor] = {"cuda": "nvidia", "hip": "amd"}
_VENDORS: dict[str, Vendor] = {"cpu": "cpu", "cu": "nvidia", "cuda": "nvidia", "rocm": "amd"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """What torch was built for: kernels goes by that, not by the GPU that is there.

    Attributes:
        version: torch's own (major, minor); None without torch.
        vendor: whose devices it was built for.
        toolkit: CUDA's or ROCm's (major, minor); None for a CPU build.
    """

    version: tuple[int, int] | None
    vendor: Vendor
    toolkit: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variant:
    path: Path
    vendor: Vendor | None  # None: any
    order: tuple[int, int]
    against: str | None  # why it does not load here


def torch_build(version: str | None) -> TorchBuild:
    """Read torch/version.py as text, which costs nothing beside importing torch."""
    own = _pair(version or "")
    try:
        located = metadata.distribution("torch").locate_file("torch/version.py")
        text = Path(str(located)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        return TorchBuild(version=own, vendor="cpu")
    for field, vendor in _FIELDS.items():
        if found := re.search(rf"^{field}\b[^=]*= *['\"]([\d.]+)", text, flags=re.MULTILINE):
            toolkit = _pair(found[1])
            return TorchBuild(version=own, vendor=vendor, toolkit=toolkit)
    return TorchBuild(version=own, vendor="cpu")


def choose(folder: Path, *, build: TorchBuild) -> tuple[Path | None, list[str]]:
    """Find the variant that loads here.

    Where every variant is for another vendor's devices, the best of those is given: its metadata
    names the mismatch better than "no variant" does.

    Returns:
        The variant's folder, or None and a line on each variant that does not load.
    """
    rejected: list[_Variant] = []
    for place in (folder, folder / "build"):
        variants = sorted(_variants(place, build=build), key=lambda v: (v.order, v.path.name))
        if fitting := [variant for variant in variants if variant.against is None]:
            return fitting[0].path, []
        rejected.extend(variants)
    if (folder / "metadata.json").is_file():
        return folder, []
    foreign = [variant for variant in rejected if variant.vendor not in (build.vendor, None)]
    if foreign:
        return foreign[0].path, []
    return None, [f"{variant.path.name}: {variant.against}" for variant in rejected]


def _variants(place: Path, *, build: TorchBuild) -> list[_Variant]:
    found = []
    for path in place.iterdir() if place.is_dir() else ():
        if not path.is_dir():
            continue
        if name := _COMPILED.fullmatch(path.name):
            vendor = _VENDORS.get(name["backend"].rstrip("0123456789"))
            # Newer stable ABIs come first.
            order = (_ORDER.index(name["kind"]), -int(name["version"]))
            against = _against_compiled(name, build=build)
        elif name := _PURE_PYTHON.fullmatch(path.name):
            universal = name["backend"] == "universal"
            vendor = _VENDORS.get(name["backend"])
            order = (_ORDER.index("pure python"), int(universal))
            fits = universal or vendor == build.vendor
            against = None if fits else f"is for {name['backend']}, this torch for {build.vendor}"
        else:
            continue
        found.append(_Variant(path=path, vendor=vendor, order=order, against=against))
    return found


def _against_compiled(name: re.Match[str], *, build: TorchBuild) -> str | None:
    """Say why a compiled variant can't be loaded by this torch on this CPU and system."""
    here = (platform.machine(), platform.system().lower())
    if (name["cpu"], name["os"]) != here:
        return f"is for {name['cpu']}-{name['os']}, this machine is {'-'.join(here)}"
    backend = name["backend"].rstrip("0123456789")
    if _VENDORS.get(backend) != build.vendor:
        return f"is for {name['backend']}, this torch for {build.vendor}"
    if build.toolkit and not _toolkit_fits(name["backend"], toolkit=build.toolkit):
        major, minor = build.toolkit
        return f"is for {name['backend']}, this torch for {backend}{major}{minor}"
    needed = (int(name["version"][0]), int(name["version"][1:]))
    text = f"torch {needed[0]}.{needed[1]}"
    if name["kind"] == "tvm-ffi":
        return None
    if build.version is None:
        return f"needs {text}, torch is not installed"
    if name["kind"] == "torch-stable-abi":
        return None if needed <= build.version else f"needs {text} or newer"
    return None if needed == build.version else f"needs exactly {text}"


def _toolkit_fits(backend: str, *, toolkit: tuple[int, int]) -> bool:
    """CUDA takes the same major and no newer minor; ROCm must be the same."""
    digits = backend.lstrip("curom")
    if not digits:
        return True
    built = (int(digits[:-1] or 0), int(digits[-1]))
    if backend.startswith("cu"):
        return built[0] == toolkit[0] and built[1] <= toolkit[1]
    return built == toolkit


def _pair(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None

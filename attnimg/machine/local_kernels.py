"""Read the folders that LOCAL_KERNELS names in place of hub kernels, without importing them.

A folder may be a kernel repository, its `build` folder, or one build variant. The name of a variant
is what it was built for: torch213-cxx11-cu130-x86_64-linux, torch-stable-abi29-..., torch-cpu. They
are chosen as in the kernels library, whose resolver imports torch and huggingface_hub (0.5 s
without torch); tests/unit/machine/test_probe.py compares the two.
Source: load.py, importer.py, resolver.py and variants.py of kernels 0.17.2 (2026-11-21).
"""

from __future__ import annotations

import ast
import json
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from attnimg.backends.flash_attention_2 import VARLEN
from attnimg.distributions import distribution
from attnimg.errors import AttnimgError
from attnimg.facts import LocalKernel, Vendor
from attnimg.files import read_regular

# A kernel's metadata.json has a few hundred bytes.
_METADATA_BYTES = 1 << 20
_COMPILED = re.compile(
    r"(?P<kind>torch-stable-abi|torch|tvm-ffi)(?P<version>\d\d+)(?:-cxx(?:11|98))?"
    r"-(?P<toolkit>(?P<backend>[a-z]+)(?P<digits>\d*))-(?P<cpu>\w+)-(?P<os>\w+)"
)
_PURE_PYTHON = re.compile(r"torch-(?P<backend>[a-z]+)")
# The order of preference where several variants fit.
_ORDER = ("torch-stable-abi", "torch", "tvm-ffi", "pure python")
# "cu" is used in names of compiled variants, "cuda" in metadata.json and pure Python variants.
_VENDORS: dict[str, Vendor] = {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd", "cu": "nvidia"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchBuild:
    """The torch build that the kernels library chooses a variant for; it ignores the GPU.

    Attributes:
        version: torch's (major, minor); None without torch.
        vendor: the vendor of the devices that it was built for.
        toolkit: CUDA's or ROCm's (major, minor); None for a CPU build.
    """

    version: tuple[int, int] | None
    vendor: Vendor
    toolkit: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuildVariant:
    path: Path
    vendor: Vendor | None  # None: any
    order: tuple[int, int]
    against: str | None  # why it does not load here


def read_local_kernels(spec: str, *, torch: str | None) -> tuple[LocalKernel, ...]:
    """Read LOCAL_KERNELS="org/name=/path:org2/name2=/path2".

    Args:
        spec: the variable's value.
        torch: torch's version, which decides the build variant.

    Raises:
        AttnimgError: an entry is malformed, or its folder has no kernel for this machine.
    """
    paths: dict[str, str] = {}
    for entry in spec.split(":"):
        repo, equals, path = entry.partition("=")
        if not equals:
            raise _entry_error(
                entry, why="found no '='; needed org/name=/path, with ':' between entries"
            )
        paths[repo] = path
    build = torch_build(torch)
    return tuple(_read(repo, path, build=build) for repo, path in paths.items())


def _read(repo: str, path: str, *, build: TorchBuild) -> LocalKernel:
    entry, folder = f"{repo}={path}", Path(path)
    if not folder.is_dir():
        raise _entry_error(entry, why=f"found no folder {path}")
    variant, rejected = choose_variant(folder, build=build)
    if variant is None:
        why = "\n".join(rejected) or "found no build variant; needed one such as build/torch-cpu"
        raise _entry_error(entry, why=why)
    metadata_json = _read_metadata(entry, variant)
    backend = metadata_json["backend"]["type"]
    if backend not in ("cpu", "cuda", "rocm"):
        why = f"found a kernel built for {backend!r}; needed one of cpu, cuda, rocm"
        raise _entry_error(entry, why=why)
    name = str(metadata_json.get("name", "")).replace("-", "_")
    exports, takes = _exports(variant, name=name)
    return LocalKernel(
        repo=repo,
        path=path,
        vendor=_VENDORS[backend],
        version=str(metadata_json.get("version", "unknown")),
        exports=exports,
        varlen_takes=takes,
    )


def _read_metadata(entry: str, variant: Path) -> dict[str, Any]:
    path = variant / "metadata.json"
    try:
        metadata_json = json.loads(read_regular(path, at_most=_METADATA_BYTES))
        metadata_json["backend"]["type"].strip()
    except OSError as error:
        raise _entry_error(entry, why=f"found no readable {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        needed = 'needed JSON with "backend": {"type": "cpu"}, "cuda" or "rocm"'
        raise _entry_error(
            entry, why=f"{path} does not name the devices that it was built for; {needed}"
        ) from error
    return dict(metadata_json)


def torch_build(version: str | None) -> TorchBuild:
    """Return the torch build, from the text of torch/version.py, as importing torch takes seconds.

    Args:
        version: torch's; None without torch.
    """
    own = _major_minor(version or "")
    try:
        located = distribution("torch").locate_file("torch/version.py")
        text = Path(str(located)).read_text(encoding="utf-8")
    except (metadata.PackageNotFoundError, OSError):
        text = ""
    vendors: dict[str, Vendor] = {"cuda": "nvidia", "hip": "amd"}
    for field, vendor in vendors.items():
        if found := re.search(rf"^{field}\b[^=]*= *['\"]([\d.]+)", text, flags=re.MULTILINE):
            return TorchBuild(version=own, vendor=vendor, toolkit=_major_minor(found[1]))
    return TorchBuild(version=own, vendor="cpu")


def choose_variant(folder: Path, *, build: TorchBuild) -> tuple[Path | None, list[str]]:
    """Return the build variant that the kernels library would load here.

    If all variants are for another vendor's devices, the best of those is returned: its metadata
    gives a better error message than "no variant".

    Returns:
        The variant's folder, or None; and a line for each variant that does not load.
    """
    rejected: list[_BuildVariant] = []
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


def _variants(place: Path, *, build: TorchBuild) -> list[_BuildVariant]:
    found = []
    for path in place.iterdir() if place.is_dir() else ():
        if not path.is_dir():
            continue
        if name := _COMPILED.fullmatch(path.name):
            # Newer stable ABIs come first.
            order = (_ORDER.index(name["kind"]), -int(name["version"]))
            against = _against_compiled(name, build=build)
        elif name := _PURE_PYTHON.fullmatch(path.name):
            universal = name["backend"] == "universal"
            order = (_ORDER.index("pure python"), int(universal))
            fits = universal or _VENDORS.get(name["backend"]) == build.vendor
            against = None if fits else f"is for {name['backend']}, this torch for {build.vendor}"
        else:
            continue
        vendor = _VENDORS.get(name["backend"])
        found.append(_BuildVariant(path=path, vendor=vendor, order=order, against=against))
    return found


def _against_compiled(name: re.Match[str], *, build: TorchBuild) -> str | None:
    """Return why this torch on this CPU and system can't load a compiled variant."""
    here = (platform.machine(), platform.system().lower())
    if (name["cpu"], name["os"]) != here:
        return f"is for {name['cpu']}-{name['os']}, this machine is {'-'.join(here)}"
    if _VENDORS.get(name["backend"]) != build.vendor:
        return f"is for {name['toolkit']}, this torch for {build.vendor}"
    if build.toolkit and (digits := name["digits"]):
        built, (major, minor) = (int(digits[:-1] or 0), int(digits[-1])), build.toolkit
        # A newer minor version of CUDA runs code for older ones; that of ROCm must be equal.
        is_older = name["backend"] == "cu" and built[0] == major and built[1] <= minor
        if built != build.toolkit and not is_older:
            return f"is for {name['toolkit']}, this torch for {name['backend']}{major}{minor}"
    if name["kind"] == "tvm-ffi":
        return None
    needed = (int(name["version"][0]), int(name["version"][1:]))
    text = f"torch {needed[0]}.{needed[1]}"
    if build.version is None:
        return f"needs {text}, torch is not installed"
    if name["kind"] == "torch-stable-abi":
        return None if needed <= build.version else f"needs {text} or newer"
    return None if needed == build.version else f"needs exactly {text}"


def _major_minor(version: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else None


def _exports(variant: Path, *, name: str) -> tuple[frozenset[str] | None, frozenset[str] | None]:
    """Return a module's public names, and the arguments of its varlen function, from its source.

    Returns:
        The public names, and the arguments of flash_attn_varlen_func; each is None when the source
        does not show it.
    """
    path = variant / "__init__.py"
    if not path.is_file():
        path = variant / name / "__init__.py"
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None, None
    names: set[str] = set()
    takes: frozenset[str] | None = None
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            if node.name == VARLEN:
                takes = _arguments(node)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            pending.extend(ast.iter_child_nodes(node))
    # With `from x import *` or a module-level __getattr__ the names are not known.
    if {"*", "__getattr__"} & names:
        return None, None
    return frozenset(name for name in names if not name.startswith("_")), takes


def _arguments(node: ast.AST) -> frozenset[str] | None:
    """Return the names of a function's arguments; None where **kwargs or a decorator hide them."""
    if not isinstance(node, ast.FunctionDef) or node.args.kwarg or node.decorator_list:
        return None
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return frozenset(argument.arg for argument in arguments)


def _entry_error(entry: str, *, why: str) -> AttnimgError:
    return AttnimgError(
        f"LOCAL_KERNELS entry {entry!r} does not name a usable kernel",
        why=why,
        do="correct the entry, or unset LOCAL_KERNELS",
        code="local-kernel",
    )

"""Look up GPUs by name, and read the facts about each image and about the image of this process."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from attnimg.errors import AttnimgError, bad_manifest
from attnimg.facts import Arch, Machine
from attnimg.files import data_file, read_data

_SM = re.compile(r"sm_([1-9][0-9]?)([0-9])")
_GFX = re.compile(r"gfx[1-9][0-9a-f]{2,3}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One entry of the catalogue.

    Attributes:
        name: the value of --on, "h100".
        arch: its architecture.
        label: its full name, "NVIDIA H100 80GB".
        memory_gb: nominal device memory; None for "cpu" and for an architecture such as "sm_90".
        cpu: the CPU architecture of its machines; None for an architecture such as "sm_90".
        data_center: the names, as nvidia-smi prints them, of it and its relatives for data centres.
    """

    name: str
    arch: Arch
    label: str
    memory_gb: int | None = None
    cpu: Literal["amd64", "arm64"] | None = None
    data_center: tuple[str, ...] = ()


def arch_from_name(name: str) -> Arch:
    """Return the architecture of a name: "sm_90", "gfx942" or "cpu".

    Raises:
        AttnimgError: the name is not of this form (code "unknown-gpu").
    """
    if name == "cpu":
        return Arch(name="cpu", vendor="cpu")
    if sm := _SM.fullmatch(name):
        return Arch(name=name, vendor="nvidia", capability=(int(sm[1]), int(sm[2])))
    if _GFX.fullmatch(name):
        return Arch(name=name, vendor="amd")
    raise _unknown(name, known=[])


def gpu_catalogue() -> dict[str, Gpu]:
    """Return data/gpus.toml: name -> GPU, in the file's order."""
    return {
        name: Gpu(
            name=name,
            arch=arch_from_name(entry["arch"]),
            label=entry["label"],
            memory_gb=entry.get("memory_gb"),
            cpu=entry.get("cpu", "amd64"),
            data_center=tuple(entry.get("data_center", ())),
        )
        for name, entry in read_data("gpus.toml").items()
    }


def parse_gpu(text: str) -> Gpu:
    """Return the GPU for a value of --on.

    Args:
        text: a name in the catalogue, or any sm_NN, sm_NNN, gfxNNN.

    Raises:
        AttnimgError: it is neither (code "unknown-gpu"); the message suggests similar names.
    """
    if text != "cpu" and (_SM.fullmatch(text) or _GFX.fullmatch(text)):
        return Gpu(name=text, arch=arch_from_name(text), label=text)
    known = gpu_catalogue()
    if text in known:
        return known[text]
    raise _unknown(text, known=list(known))


def cpus_of_machines(arch: Arch) -> frozenset[str]:
    """Return the CPU architectures of machines with a GPU architecture, from the catalogue."""
    return frozenset(gpu.cpu for gpu in gpu_catalogue().values() if gpu.arch == arch and gpu.cpu)


def _unknown(text: str, *, known: list[str]) -> AttnimgError:
    lower = text.strip().lower()
    if lower in known or _SM.fullmatch(lower) or _GFX.fullmatch(lower):
        why = f"found {text!r}; needed {lower!r}: without blanks and in lower case"
        do = f"write {lower}"
    elif lower.startswith(("sm_", "gfx")):
        why = f"found {text!r}; needed sm_ and two or three digits, or gfx and three or four"
        do = "write an architecture as sm_90 or gfx942"
    else:
        similar = difflib.get_close_matches(lower, known, n=3, cutoff=0.5)
        why = f"found {text!r}; needed sm_NN, sm_NNN, gfxNNN" + (
            f", or one of: {' '.join(known)}" if known else " or cpu"
        )
        do = (
            f"did you mean {' or '.join(similar)}?"
            if similar
            else "write the name of a GPU, such as h100 or sm_90"
        )
    return AttnimgError(f"unknown GPU {text!r}", why=why, do=do, code="unknown-gpu")


MANIFEST = Path("/opt/attnimg/image.json")

DIGEST_VARIABLE = "ATTNIMG_IMAGE_DIGEST"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageFacts:
    """One image.

    Attributes:
        name: its tag, "hopper".
        aliases: further tags, such as "ada".
        channel: "stable" or "frontier".
        devices: the architectures it runs on, the most common first.
        platforms: the platforms it is built for, "linux/amd64"; it starts on no other.
        torch: its torch version; None where it is not resolved.
        driver_min: lowest GPU driver version; None without a GPU.
        packages: distribution -> version: those that the recipe names; in an image, all of them.
        kernels: distribution of each attention kernel -> the devices it has code for.
        kernel_platforms: distribution of each attention kernel -> the platforms that have it.
        fixed: those of `packages` that nothing may replace: torch, CUDA's, Triton, the kernels.
        version: attnimg's version, or "dev" if it was not built from the commit of a release; None
            in the catalogue.
        revision: the git commit that it was built from, with -dirty for a changed checkout; None in
            the catalogue, and where no checkout was known.
    """

    name: str
    aliases: tuple[str, ...]
    channel: str
    devices: tuple[str, ...]
    platforms: tuple[str, ...]
    torch: str | None
    driver_min: str | None
    packages: Mapping[str, str]
    kernels: Mapping[str, frozenset[str]]
    kernel_platforms: Mapping[str, frozenset[str]]
    fixed: frozenset[str]
    version: str | None = None
    revision: str | None = None


@cache
def image_catalogue() -> dict[str, ImageFacts]:
    """Read data/images.json, which is generated from the recipes: name -> image, stable first."""
    return parse_images(data_file("images.json").read_text("utf-8"))


def parse_images(text: str) -> dict[str, ImageFacts]:
    """Parse the text of images.json: name -> image, stable ones first."""
    found = [_image_facts(name, facts) for name, facts in json.loads(text)["images"].items()]
    return {image.name: image for image in sorted(found, key=lambda i: i.channel != "stable")}


def this_image(manifest: Path = MANIFEST) -> ImageFacts | None:
    """Read the manifest of this image; return None outside an image.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    try:
        raw = json.loads(manifest.read_text("utf-8"))
        return _image_facts(raw["image"], raw | {"packages": raw["installed"]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad_manifest(manifest, error) from error


def image_record(
    environ: Mapping[str, str], manifest: Path = MANIFEST
) -> dict[str, str | None] | None:
    """Return what identifies the image of this process, for receipts; None outside an image.

    Args:
        environ: DIGEST_VARIABLE has the image's digest. An image can't contain it, and a process in
            a container can't read it: whoever starts the container sets it (`make run/NAME` does).
        manifest: the image's manifest.

    Returns:
        name, version and revision (see ImageFacts), and digest: None unless it is set and valid.
    """
    image = this_image(manifest)
    if image is None:
        return None
    digest = environ.get(DIGEST_VARIABLE, "").rpartition("@")[2].strip()
    return {
        "name": image.name,
        "version": image.version,
        "revision": image.revision,
        "digest": digest if _DIGEST.fullmatch(digest) else None,
    }


def find_image(name: str) -> ImageFacts:
    """Return the image with a tag or an alias.

    Raises:
        AttnimgError: there is none (code "unknown-image").
    """
    for image in image_catalogue().values():
        if name == image.name or name in image.aliases:
            return image
    similar = difflib.get_close_matches(name.lower(), image_catalogue(), n=2)
    raise AttnimgError(
        f"there is no image {name!r}",
        why=f"the images are {', '.join(image_catalogue())}",
        do=f"did you mean {' or '.join(similar)}?" if similar else "pass one of these",
        code="unknown-image",
    )


def image_for(
    arch: Arch, images: Mapping[str, ImageFacts] | None = None, *, cpu: str | None = None
) -> ImageFacts | None:
    """Return the image for an architecture; None when there is none.

    Args:
        arch: the architecture that it must have code for.
        images: the images to choose from; None for the catalogue.
        cpu: the CPU architecture that it must run on; None for any.
    """
    known = image_catalogue() if images is None else images
    return next((image for image in known.values() if image_runs_on(image, arch, cpu=cpu)), None)


def cpu_name(machine: str) -> str:
    """Return Docker's name of a CPU architecture: "amd64" for Python's "x86_64".

    Args:
        machine: the value of platform.machine().
    """
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine.lower(), machine.lower())


def image_text(image: ImageFacts, platform: str) -> str:
    """Return an image's name: "attnimg:hopper", "attnimg:hopper, its linux/arm64 build"."""
    build = "" if platform == image.platforms[0] else f", its {platform} build"
    return f"attnimg:{image.name}{build}"


def image_runs_on(image: ImageFacts, arch: Arch, *, cpu: str | None) -> bool:
    """Return whether an image has code for an architecture and runs on a CPU (None: any)."""
    return arch.name in image.devices and (cpu is None or f"linux/{cpu}" in image.platforms)


def machine_with(
    image: ImageFacts | None, arch: Arch, label: str, *, cpu: str | None = None
) -> Machine:
    """Return a machine with the packages of an image that have code for its architecture.

    Without an image, every package is assumed.

    Args:
        image: the image.
        arch: the architecture of the GPU.
        label: the GPU's name.
        cpu: the CPU architecture, for which the image may lack a kernel; None for that of the
            image's first platform.
    """
    if image is None:
        return Machine(arch=arch, gpu=label)
    platform = f"linux/{cpu}" if cpu else image.platforms[0]
    packages = {
        name: version
        for name, version in image.packages.items()
        if name not in image.kernels
        or (arch.name in image.kernels[name] and platform in image.kernel_platforms[name])
    }
    return Machine(arch=arch, gpu=label, packages=packages, torch=image.torch)


def _image_facts(name: str, raw: Mapping[str, Any]) -> ImageFacts:
    return ImageFacts(
        name=name,
        aliases=tuple(raw["aliases"]),
        channel=raw["channel"],
        devices=tuple(raw["devices"]),
        platforms=tuple(raw["platforms"]),
        torch=raw["torch"],
        driver_min=raw["driver_min"],
        packages=raw["packages"],
        kernels={kernel["name"]: frozenset(kernel["devices"]) for kernel in raw["kernels"]},
        kernel_platforms={kernel["name"]: frozenset(kernel["keys"]) for kernel in raw["kernels"]},
        fixed=frozenset(raw["fixed"]),
        version=raw.get("version"),
        revision=raw.get("revision"),
    )

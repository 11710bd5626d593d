"""Read the facts about each image, and about the image that this process runs in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError, bad_manifest
from attnimg.facts import Arch, Machine
from attnimg.files import data_file

MANIFEST = Path("/opt/attnimg/image.json")


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


@cache
def catalogue() -> dict[str, ImageFacts]:
    """Read data/images.json, which is generated from the recipes: name -> image, stable first."""
    return parse(data_file("images.json").read_text("utf-8"))


def parse(text: str) -> dict[str, ImageFacts]:
    """Parse such a catalogue: name -> image, stable ones first."""
    found = [_facts(name, facts) for name, facts in json.loads(text)["images"].items()]
    return {image.name: image for image in sorted(found, key=lambda i: i.channel != "stable")}


def this_image(manifest: Path = MANIFEST) -> ImageFacts | None:
    """Read the manifest of this image; return None outside an image.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    try:
        raw = json.loads(manifest.read_text("utf-8"))
        return _facts(raw["image"], raw | {"packages": raw["installed"]})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise bad_manifest(manifest, error) from error


def image_named(name: str) -> ImageFacts:
    """Return the image with a tag or an alias.

    Raises:
        AttnimgError: there is none (code "unknown-image").
    """
    for image in catalogue().values():
        if name == image.name or name in image.aliases:
            return image
    near = get_close_matches(name.lower(), catalogue(), n=2)
    raise AttnimgError(
        f"there is no image {name!r}",
        why=f"known are {', '.join(catalogue())}",
        do=f"did you mean {' or '.join(near)}?" if near else "pass one of these",
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
    known = catalogue() if images is None else images
    return next((image for image in known.values() if runs_on(image, arch, cpu=cpu)), None)


def runs_on(image: ImageFacts, arch: Arch, *, cpu: str | None) -> bool:
    """Return whether an image has code for an architecture and runs on a CPU (None: any)."""
    return arch.name in image.devices and (cpu is None or f"linux/{cpu}" in image.platforms)


def machine_with(image: ImageFacts | None, arch: Arch, label: str) -> Machine:
    """Return a machine with the packages of an image that have code for its architecture.

    Without an image, every package is assumed.
    """
    if image is None:
        return Machine(arch=arch, gpu=label)
    packages = {
        name: version
        for name, version in image.packages.items()
        if name not in image.kernels or arch.name in image.kernels[name]
    }
    return Machine(arch=arch, gpu=label, packages=packages, torch=image.torch)


def _facts(name: str, raw: Mapping[str, Any]) -> ImageFacts:
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
    )

#!/usr/bin/env python3
"""Show that the built images with the same torch share its layer, and that of the stack.

    docker/shared_layers.py     compare all images attnimg:NAME and attnimg:NAME-devel of the engine

A machine pulls and stores such a layer once for all of them. Needs the standard library only.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import base_image
import platforms

DEVEL = "-devel"
# Layer -> what only its command in the Dockerfile has.
SHARED = {"torch": "-r /torch.txt", "stack": "-r /stack.txt"}
# Instructions of the Dockerfile that make a layer; others, such as ENV, change the settings alone.
_MAKE_A_LAYER = ("RUN", "COPY", "ADD", "WORKDIR")


class Layer(NamedTuple):
    """A layer of an image: the digest of its files, and their bytes."""

    digest: str
    bytes: int


def fail(what: str, why: str, do: str) -> NoReturn:
    """Exit with an error: what happened, why, and what to do."""
    base_image.fail(what, why, do, program="shared-layers")


def docker(*arguments: str) -> str:
    """Run docker; return its stdout, or exit."""
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        fail("docker is not installed", "found no program docker on PATH", "make engine")
    if done.returncode:
        fail(f"docker {arguments[0]} failed", done.stderr.strip() or "no reason", "make engine")
    return done.stdout


def find_layer(history: Sequence[Any], digests: Sequence[str], mark: str) -> Layer | None:
    """Return the layer whose command has a mark; None if there is none.

    Args:
        history: of the image, the newest command first, as Docker prints it: with commands that
            made no layer.
        digests: of its layers, the lowest first.
        mark: a part of the command.
    """
    above = 0
    for entry in history:
        command = entry["CreatedBy"]
        if mark in command and above < len(digests):
            return Layer(digests[-1 - above], int(entry["Size"]))
        above += command.startswith(_MAKE_A_LAYER)
    return None


def read_layers(image: str) -> dict[str, Layer]:
    """Return the layers of an image that others share: their names are those of SHARED."""
    lines = docker("history", "--no-trunc", "--human=false", "--format={{json .}}", image)
    history = [json.loads(line) for line in lines.splitlines()]
    digests = json.loads(docker("image", "inspect", "--format={{json .RootFS.Layers}}", image))
    found = {name: find_layer(history, digests, mark) for name, mark in SHARED.items()}
    return {name: layer for name, layer in found.items() if layer}


def built_images(targets: dict[str, Any]) -> dict[str, list[str]]:
    """Return the images of the engine by their lock, the versions of torch and its libraries.

    Args:
        targets: of the bake file.
    """
    lines = docker("image", "ls", "--format={{.ID}} {{.Tag}}", "--filter=reference=attnimg:*")
    found: dict[str, dict[str, str]] = {}
    for line in sorted(lines.splitlines()):
        image_id, tag = line.split(maxsplit=1)
        # An alias is a second tag of an image, and no target.
        if common := targets.get(f"{tag.removesuffix(DEVEL)}_common"):
            found.setdefault(common["args"]["LOCK"], {})[image_id] = f"attnimg:{tag}"
    return {lock: sorted(images.values()) for lock, images in found.items()}


def compare(layers: dict[str, dict[str, Layer]]) -> Iterator[tuple[str, bool, str]]:
    """Yield each shared layer: its name, whether all images have the same one, and a text.

    Args:
        layers: image -> name -> layer.
    """
    for name in SHARED:
        images: dict[str, list[str]] = {}
        for image, own in layers.items():
            digest = own[name].digest if name in own else "no such layer"
            images.setdefault(digest, []).append(image)
        largest = max((own[name].bytes for own in layers.values() if name in own), default=0)
        text = "; ".join(f"{digest[:19]} in {', '.join(who)}" for digest, who in images.items())
        same = len(images) == 1 and "no such layer" not in images
        yield name, same, f"{name}, {largest / 1e6:,.0f} MB: {text}"


def main() -> None:
    """Compare, and exit with an error if images differ or fewer than two can be compared."""
    by_lock = built_images(platforms.bake_targets(platforms.own_platform()))
    groups = {lock: images for lock, images in by_lock.items() if len(images) > 1}
    if not groups:
        found = "; ".join(f"{', '.join(images)} (torch {lock})" for lock, images in by_lock.items())
        image = next(iter(by_lock.values()), ["attnimg:cpu"])[0]
        name = image.removeprefix("attnimg:").removesuffix(DEVEL)
        fail(
            "fewer than two images with the same torch are built",
            f"found {found or 'none'} in the Docker engine",
            f"make build/{name} build/{name}{DEVEL}",
        )
    differ = []
    for lock, images in groups.items():
        print(f"shared-layers: torch {lock}, {' and '.join(images)}")
        for _, same, text in compare({image: read_layers(image) for image in images}):
            print(f"  {'shared' if same else 'DIFFERS'}  {text}")
            differ += [] if same else [text]
    if differ:
        fail(
            "images with the same torch have different layers",
            "\n       ".join(differ),
            "build them from the same commit on this engine: make build/NAME for each",
        )


if __name__ == "__main__":
    main()

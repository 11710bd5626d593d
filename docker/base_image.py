#!/usr/bin/env python3
"""Choose the base image of a build, and fetch it by its digest; needs the standard library only.

    docker/base_image.py        print the name and the digest of the base (`make base`)

The base is, in this order: BASE_IMAGE=REFERENCE@sha256:... of the environment; the one of
recipes/bases.toml at its digest; where that is unresolved or can't be pulled, the stand-in that
docker/base.sh makes of Debian's packages. The one that is used is printed, and named in the labels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

BAKE = Path("docker/docker-bake.json")
STAND_IN = "attnimg-base:bookworm"
_PINNED = re.compile(r"(?P<name>[^\s@]+?)(?P<tag>:[\w.-]+)?@(?P<digest>sha256:[0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The base of a build.

    Attributes:
        context: the address for bake.
        name: registry, name and tag; attnimg-base:bookworm for the stand-in.
        digest: of the index or manifest that was pulled; the stand-in's image id.
    """

    context: str
    name: str
    digest: str


def fail(what: str, why: str, do: str, *, program: str = "base") -> NoReturn:
    """Exit with an error: what happened, why, and what to do."""
    sys.exit(f"{program}: {what}\n  why: {why}\n  do:  {do}")


def fetch_base() -> BaseImage:
    """Return the base after it was pulled or made; exit if that fails."""
    if shutil.which("docker") is None:
        fail(
            "there is no base image without docker",
            f"found no program docker on PATH, {os.environ.get('PATH', '')!r}",
            "install Docker with buildx, or add its folder to PATH",
        )
    if asked := os.environ.get("BASE_IMAGE", ""):
        if not _PINNED.fullmatch(asked):
            fail(
                "BASE_IMAGE has no digest",
                f"found {asked!r}, needed NAME:TAG@sha256: and 64 hexadecimal digits",
                f"docker buildx imagetools inspect {asked.partition('@')[0]} prints its digest",
            )
        found, reason = pull(asked)
        if found is None:
            fail(f"the base {asked} can't be pulled", reason, "correct BASE_IMAGE, or omit it")
        return found
    default = json.loads(BAKE.read_text(encoding="utf-8"))["variable"]["BASE"]["default"]
    recipe = default.removeprefix("docker-image://")
    reason = f"recipes/bases.toml has no digest of {recipe}: make lock resolves it"
    if _PINNED.fullmatch(recipe):
        found, reason = pull(recipe)
        if found is not None:
            return found
        reason = f"{recipe} can't be pulled: {reason}"
    print(f"base: using the stand-in {STAND_IN}, made of Debian's packages; {reason}", flush=True)
    return stand_in()


def pull(reference: str) -> tuple[BaseImage | None, str]:
    """Pull NAME[:TAG]@DIGEST, unless the engine has it; return it, or None and why not."""
    parts = _PINNED.fullmatch(reference)
    assert parts is not None
    # By name and digest alone: the engine does not look up an image by tag and digest together.
    exact = f"{parts['name']}@{parts['digest']}"
    for command in (["docker", "image", "inspect", exact], ["docker", "pull", "-q", exact]):
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=600
            )
        except subprocess.TimeoutExpired:
            return None, "docker pull did not end within 600 seconds"
        if process.returncode == 0:
            name = parts["name"] + (parts["tag"] or "")
            return BaseImage(f"docker-image://{exact}", name, parts["digest"]), ""
    return None, process.stderr.strip().splitlines()[-1] if process.stderr.strip() else "no reason"


def stand_in(arch: str = "") -> BaseImage:
    """Make the stand-in unless the engine has it, and return it.

    Args:
        arch: "arm64", for another processor than this machine's; its programs run by qemu-user.
    """
    name = f"{STAND_IN}-{arch}" if arch else STAND_IN
    made = subprocess.run([Path(__file__).with_name("base.sh"), name, "", arch], check=False)
    if made.returncode:
        sys.exit(made.returncode)
    command = ["docker", "image", "inspect", "--format={{.Id}}", name]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return BaseImage(f"docker-image://{name}", name, process.stdout.strip())


def for_platform(base: BaseImage, platform: str) -> BaseImage:
    """Return the base for another platform than this machine's: the same index, or a stand-in.

    Its programs will run by qemu-user, which docker/qemu.sh installs where it is missing.
    """
    arch = platform.rpartition("/")[2]
    process = subprocess.run([Path(__file__).with_name("qemu.sh"), arch], check=False)
    if process.returncode:
        sys.exit(process.returncode)
    return stand_in(arch) if base.name == STAND_IN else base


if __name__ == "__main__":
    base = fetch_base()
    print(f"base: {base.name} {base.digest}")

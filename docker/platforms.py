"""Choose the platform of a build, and name its files; needs the standard library only.

The platform is PLATFORM of the environment, or this machine's. Files of linux/amd64 have plain
names: dist/hopper, docker/images/hopper, a lock file torch-2.14.1-cu130.txt; those of another
platform end with it: dist/hopper-arm64. An image in the engine is attnimg:NAME, and
attnimg:NAME-arm64 where its platform is not this machine's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from base_image import BAKE, fail

# What `uname -m` prints, on Linux and on macOS -> the platform of Docker's engine there.
MACHINES = {
    "x86_64": "linux/amd64",
    "amd64": "linux/amd64",
    "aarch64": "linux/arm64",
    "arm64": "linux/arm64",
}
FIRST = "linux/amd64"


def own_platform() -> str:
    """Return this machine's platform."""
    machine = os.uname().machine
    return MACHINES.get(machine, f"linux/{machine}")


def choose_platform(name: str, platforms: Sequence[str]) -> str:
    """Return the platform to build an image for; exit if its recipe lacks it.

    Args:
        name: the image.
        platforms: those of its recipe.
    """
    asked = os.environ.get("PLATFORM", "")
    platform = asked or own_platform()
    if platform not in platforms:
        found = f"PLATFORM={asked}" if asked else f"this machine's platform, {platform}"
        fail(
            f"the image {name} is not built for {platform}",
            f"found {found}; recipes/images/{name}.toml has {', '.join(platforms)}",
            f"set PLATFORM={platforms[0]}",
            program="build",
        )
    return platform


def files_end(platform: str) -> str:
    """Return the suffix of the names of a platform's files: "" or "-arm64"."""
    return "" if platform == FIRST else f"-{platform.partition('/')[2]}"


def bake_variables(platform: str) -> dict[str, str]:
    """Return the variables of the bake file for a platform."""
    tag_end = "" if platform == own_platform() else f"-{platform.partition('/')[2]}"
    return {"PLATFORM": platform, "ARCH": files_end(platform), "TAG_END": tag_end}


def of_make() -> str:
    """Return what a make command for this platform ends with: "" or " PLATFORM=linux/arm64"."""
    platform = os.environ.get("PLATFORM", "")
    return f" PLATFORM={platform}" if platform not in ("", own_platform()) else ""


def bake_targets(platform: str) -> dict[str, dict[str, Any]]:
    """Return the targets of the bake file, with the file names of a platform."""
    text = BAKE.read_text(encoding="utf-8").replace("${ARCH}", files_end(platform))
    targets: dict[str, dict[str, Any]] = json.loads(text)["target"]
    return targets

"""Write an image's manifest and the list of attnimg's commands to /opt/attnimg.

    python image_files.py IMAGE WHEELHOUSE

IMAGE ends with the platform, "hopper-arm64", where that is not the first. The manifest has the
values of attnimg/data/images.json, the version and the git commit of the image (VERSION and
REVISION in the environment, as in its labels), the installed versions, and the hash of each wheel
that was built for this image. The build fails if kernels break one another.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import sys
import sysconfig
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from attnimg.__main__ import COMMANDS
from attnimg.machine.host import this_host
from attnimg.selection.gpus_and_images import cpu_name

FOLDER = Path("/opt/attnimg")
# The line of a .pth file, which Python runs at its start: a program that bypasses the entrypoint,
# or is started by docker exec, has the same folders of caches, and threads for its CPUs. Importing
# the module takes about 20 ms, which a process saves if its parent has set them for the same user
# and CPUs.
AT_START = (
    "import os; os.environ.get('ATTNIMG_SET_FOR') == f'{os.geteuid()} "
    '{len(os.sched_getaffinity(0))} {os.environ.get("LOCAL_WORLD_SIZE", str())}\' or '
    "__import__('attnimg.machine.container', fromlist=['main']).set_up_program()"
)


def recipe_of(image: str, machine: str) -> tuple[str, dict[str, Any]]:
    """Return the name of an image, and its recipe as it is on one platform.

    Args:
        image: "hopper", or "hopper-arm64".
        machine: the value of platform.machine().
    """
    text = resources.files("attnimg").joinpath("data", "images.json").read_text(encoding="utf-8")
    images, here = json.loads(text)["images"], f"linux/{cpu_name(machine)}"
    name = image if image in images else image.rpartition("-")[0]
    recipe = images[name]
    if here not in recipe["platforms"]:
        sys.exit(f"image_files: {name} is for {' '.join(recipe['platforms'])}, found {here}")
    return name, {
        **recipe,
        "platforms": [here],
        "abi": {here: recipe["abi"][here]},
        "kernels": [
            {**kernel, "keys": {here: kernel["keys"][here]}}
            for kernel in recipe["kernels"]
            if here in kernel["keys"]
        ],
    }


def manifest(image: str, wheelhouse: Path) -> dict[str, Any]:
    """Return the recipe of this image, and what is installed in it.

    Args:
        image: as in recipe_of.
        wheelhouse: the folder of the kernels' wheels that were built for it.
    """
    name, recipe = recipe_of(image, platform.machine())
    installed = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    for kernel in recipe["kernels"]:
        found = installed.get(kernel["name"], "nothing")
        # A small build has +trim in its version: `attnimg doctor` and the gate `pins` report it.
        if found.removesuffix("+trim") != kernel["version"]:
            sys.exit(f"image_files: {kernel['name']} {kernel['version']} is needed, found {found}")
    return {
        "image": name,
        "version": os.environ.get("VERSION") or "dev",
        "revision": os.environ.get("REVISION") or None,
        **recipe,
        "python": platform.python_version(),
        "installed": dict(sorted(installed.items())),
        "wheels": {
            wheel.name: hashlib.sha256(wheel.read_bytes()).hexdigest()
            for wheel in sorted(wheelhouse.glob("*.whl"))
        },
    }


def check_kernels() -> None:
    """Exit if one kernel hides or overwrites another, or FlashAttention-4 can't be imported."""
    host = this_host()
    if host.damaged or host.shadows or set(host.cute_owners) - {"flash-attn-4"}:
        sys.exit(f"image_files: {host.cute_owners=} {host.damaged=} {host.shadows=}")
    if host.cute_owners:
        # flash-attn's old copy of this package has no backward pass for Hopper.
        importlib.import_module("flash_attn.cute.flash_bwd_sm90")
        importlib.import_module("flash_attn.cute.interface")


def main(image: str, wheelhouse: Path) -> None:
    """Check the kernels; write image.json, the entrypoint's list of commands, and the .pth file."""
    check_kernels()
    (FOLDER / "image.json").write_text(json.dumps(manifest(image, wheelhouse), indent=1) + "\n")
    (FOLDER / "commands").write_text("\n".join(COMMANDS) + "\n")
    (Path(sysconfig.get_path("purelib")) / "attnimg_container.pth").write_text(AT_START + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

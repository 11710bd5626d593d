"""Fetch the ROCm build of torch and its Triton, which PyPI does not have; needs a pip.

They are on PyTorch's index for one ROCm release, which recipes/torch.toml names, or on TORCH_INDEX:
another index, or a folder. Their hashes are those of recipes/torch.toml, which `make lock` writes
where the index can be reached. Until then they are fetched from a TORCH_INDEX that is named, with a
warning that prints their hashes: such a build is not that of a commit, and is not published.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from base_image import fail
from torch_wheel import FOLDER, environment, pip, places

LOCKS = Path("requirements/images")
# The end of the names of lock files with hashes that no recipe has; git ignores them.
UNVERIFIED = "-unverified"
_PLATFORM = ("--only-binary=:all:", "--implementation=cp", "--platform=manylinux_2_28_x86_64")


def read_wanted(name: str) -> dict[str, Any]:
    """Return the wheels of torch that an image needs, with their hashes and their index."""
    content = Path(f"docker/images/{name}/rocm.json").read_text(encoding="utf-8")
    return dict(json.loads(content))


def refuse_unknown_hashes(name: str) -> None:
    """Exit if no hash is known and no index is named to take the files from."""
    wanted = read_wanted(name)
    if wanted["unresolved"] and not os.environ.get("TORCH_INDEX"):
        fail(
            f"the image {name} can't be built yet",
            wanted["unresolved"],
            f"make lock, where {wanted['index']} can be reached; or make build/{name} "
            f"TORCH_INDEX={wanted['index']}, another index or a folder: with hashes that nobody "
            "has verified",
            program="build",
        )


def rocm_wheels(name: str) -> tuple[Path, str]:
    """Return a folder with the wheels of an image, and which lock files have their hashes."""
    wanted = read_wanted(name)
    folder = FOLDER / wanted["lock"]
    # A file of an earlier, unverified build is asked for again.
    found = {} if wanted["unresolved"] else _hashes(folder, wanted)
    if not _fault(found, wanted):
        return folder, str(wanted["lock"])
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    where = places(wanted["index"])[-1]
    command = [*pip(), "download", "-q", "--disable-pip-version-check", "--no-deps", *_PLATFORM]
    command += [f"--python-version={wanted['python']}", f"--dest={folder}", *where]
    process = subprocess.run(
        [*command, *wanted["requirements"]],
        capture_output=True,
        text=True,
        check=False,
        env=environment(where),
    )
    found = _hashes(folder, wanted)
    fault = _fault(found, wanted)
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
        fault = lines[-1] if lines else process.stderr.strip()
    if fault:
        fail(
            f"there is no ROCm build of torch for the image {name}",
            f"pip download {' '.join(where)}: {fault}",
            f"make build/{name} TORCH_INDEX=INDEX, another index or a folder that has it",
            program="build",
        )
    return folder, _unverified_lock(wanted, found) if wanted["unresolved"] else wanted["lock"]


def _hashes(folder: Path, wanted: dict[str, Any]) -> dict[str, str]:
    """Return requirement -> the hash of its wheel in a folder."""
    found = {}
    for requirement in wanted["requirements"]:
        start = requirement.replace("-", "_").replace("==", "-") + "-"
        for path in folder.glob("*.whl"):
            if path.name.startswith(start):
                with path.open("rb") as file:
                    found[requirement] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _fault(found: dict[str, str], wanted: dict[str, Any]) -> str:
    """Return what is missing, or has another hash than the recipe; empty if nothing."""
    for requirement in wanted["requirements"]:
        if requirement not in found:
            return f"found no wheel of {requirement}"
        known = wanted["hashes"].get(requirement)
        if known and found[requirement] not in known:
            return f"{requirement} has sha256 {found[requirement]}, needed {' or '.join(known)}"
    return ""


def _unverified_lock(wanted: dict[str, Any], found: dict[str, str]) -> str:
    """Write lock files with the hashes that were found; print them, and return the files' name."""
    name = f"{wanted['lock']}{UNVERIFIED}"
    for layer in ("torch", "stack", "toolchain"):
        text = (LOCKS / f"{layer}-{wanted['lock']}.txt").read_text(encoding="utf-8")
        if layer == "torch":
            text += "".join(f"{key} --hash=sha256:{value}\n" for key, value in found.items())
        (LOCKS / f"{layer}-{name}.txt").write_text(text, encoding="utf-8")
    lines = "".join(f"\n       {key} sha256:{value}" for key, value in found.items())
    print(
        f"build: warning: nobody has verified these files{lines}\n"
        f"  why: {wanted['unresolved']}\n"
        "  do:  make lock where the index can be reached, and compare; do not publish this image",
        file=sys.stderr,
    )
    return name

"""Fetch the CPU build of torch, which PyPI does not have; needs the standard library and a pip.

PyPI's torch of the same version is the CUDA build, half a gigabyte. So pip is asked for the version
`VERSION+cpu`, which only the CPU build has: in the folders of pip's own configuration (find-links),
then in PyTorch's index for CPUs, which recipes/torch.toml names; or in TORCH_INDEX alone, another
index or a folder, whatever pip's configuration says. The file must have a hash of
recipes/torch.toml.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from base_image import fail

FOLDER = Path("build/torch-wheel")
# The wheel is for the image's Python and platform, not for the ones that run this.
_FOR_IMAGE = ("--only-binary=:all:", "--implementation=cp")
_TAGS = {"linux/amd64": "manylinux_2_28_x86_64", "linux/arm64": "manylinux_2_28_aarch64"}

# User and password of an address, which are not printed.
_LOGIN = re.compile(r"//[^/\s]*@")
# pip ignores an empty variable, and reads its configuration files then.
_ALONE = {"PIP_FIND_LINKS": os.devnull, "PIP_NO_INDEX": "0"}


def refuse_unknown_wheel(files: str) -> None:
    """Exit if the hash of the CPU build of an image's torch is not known yet.

    Args:
        files: the name of the image's files for its platform, "cpu-arm64".
    """
    path = Path(f"docker/images/{files}/torch.json")
    if not path.exists():
        return
    wanted = json.loads(path.read_text(encoding="utf-8"))
    if wanted["unresolved"]:
        fail(
            f"there is no CPU build of torch {wanted['version']} for {wanted['platform']} yet",
            f"the hash of {', '.join(wanted['wheels'])} is unresolved: "
            + "; ".join(wanted["unresolved"]),
            f"make lock, where {wanted['index']} can be reached, or make lock TORCH_INDEX=INDEX, "
            "another index or a folder that has it, if you trust its source",
            program="build",
        )


def torch_wheel(name: str, files: str) -> Path:
    """Return a folder with the one wheel of an image; exit if there is none with a known hash.

    Args:
        name: the image.
        files: the name of its files for its platform.
    """
    wanted = json.loads(Path(f"docker/images/{files}/torch.json").read_text(encoding="utf-8"))
    folder = FOLDER / f"{wanted['version']}{files.removeprefix(name)}"
    if not wheel_fault(folder, wanted):
        return folder
    tried = []
    for where in places(wanted["index"]):
        shutil.rmtree(folder, ignore_errors=True)
        fault = download(folder, wanted, where) or wheel_fault(folder, wanted)
        if not fault:
            return folder
        tried.append(_LOGIN.sub("//****@", f"pip download {' '.join(where)}: {fault}"))
    shutil.rmtree(folder, ignore_errors=True)
    return fail(
        f"there is no CPU build of torch {wanted['version']}",
        "\n       ".join(tried),
        f"make build/{name} TORCH_INDEX=INDEX, another index or a folder that has it; a file with "
        "another hash, if you trust its source: add the hash to recipes/torch.toml, then make lock",
        program="build",
    )


def places(index: str) -> list[list[str]]:
    """Return the options of pip for each place to look in, in order."""
    if asked := os.environ.get("TORCH_INDEX", ""):
        if Path(asked).is_dir():
            return [["--no-index", f"--find-links={asked}"]]
        return [[f"--index-url={asked}"]]
    return [["--no-index"], [f"--index-url={index}"]]


def download(folder: Path, wanted: dict[str, Any], where: list[str]) -> str:
    """Download the wheel; return the last line of pip's error, empty if there is none."""
    command = [*pip(), "download", "-q", "--disable-pip-version-check", "--no-deps", *_FOR_IMAGE]
    command += [f"--platform={_TAGS[wanted['platform']]}"]
    command += [f"--python-version={wanted['python']}", f"--dest={folder}", *where]
    command += [f"torch=={wanted['version']}+cpu"]
    env = dict(os.environ)
    if os.environ.get("TORCH_INDEX"):
        env |= _ALONE
        env["PIP_EXTRA_INDEX_URL"] = where[-1].partition("=")[2]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = [line for line in process.stderr.splitlines() if line.startswith("ERROR")]
    reason = lines[-1] if lines else process.stderr.strip()
    if "No matching distribution" in reason and "--no-index" not in where:
        reason += ", or the index was not reached"  # pip says the same of both
    return reason if process.returncode else ""


def wheel_fault(folder: Path, wanted: dict[str, Any]) -> str:
    """Return what is wrong with a folder; empty if it has one wheel, with a known hash."""
    wheels = sorted(folder.glob("*"))
    if len(wheels) != 1:
        return f"found {len(wheels)} files in {folder}, needed one"
    if not wheels[0].is_file():
        return f"{wheels[0]} is no file"
    try:
        with wheels[0].open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{wheels[0]} can't be read: {error.strerror}"
    known = wanted["wheels"].get(wheels[0].name, ())
    needed = " or ".join(known) or " or ".join(wanted["wheels"])
    return "" if sha256 in known else f"{wheels[0].name} has sha256 {sha256}, needed {needed}"


def pip() -> list[str]:
    """Return the command of a pip; exit if this machine has none."""
    for python in (sys.executable, ".venv/bin/python", "python3.11", "python3"):
        if shutil.which(python):
            command = [python, "-m", "pip"]
            process = subprocess.run([*command, "--version"], capture_output=True, check=False)
            if process.returncode == 0:
                return command
    return fail(
        "there is no pip to download torch with",
        "python3 -m pip fails",
        "apt-get install python3-pip",
        program="build",
    )

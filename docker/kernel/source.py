"""Read the build of a kernel, and prepare its source: fetched, verified by its hash, patched."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

PIP = (sys.executable, "-m", "pip", "--cert=/etc/ssl/certs/ca-certificates.crt")
# The same path in every build: it is part of what a compiler cache compares.
WORK = Path(tempfile.gettempdir()) / "kernel"
PATCHES = Path(os.environ.get("PATCHES", "/patches"))
SOURCE = Path(os.environ.get("SOURCE", "/source"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """docker/images/IMAGE/kernels/NAME.json, rendered from the recipes of image and kernel.

    Attributes:
        name: the distribution.
        key: names the wheel; the hash of all that goes into it.
        archs: the image's architectures that it serves.
        source: name==version on the index; empty for a git tree, which lies in SOURCE.
        sha256: of what is downloaded.
        prebuilt: a wheel that is taken instead, as pip names it; empty for none.
        directory: of the setup.py or pyproject.toml, in the source.
        remove: folders of the source that are deleted first.
        arch_variable: the environment variable that takes the tokens; empty for none.
        tokens: what the build calls the architectures.
        env: the rest of its environment.
        trim_env: further environment of the small build; empty where there is none.
        job_memory_gb: what one compiler may need, in GB.
        trimmed: whether the small build is asked for, by TRIM, and there is one.
    """

    name: str
    version: str
    key: str
    archs: list[str]
    source: str
    sha256: str
    prebuilt: str
    directory: str
    remove: list[str]
    arch_variable: str
    tokens: list[str]
    env: dict[str, str]
    trim_env: dict[str, str]
    job_memory_gb: float
    trimmed: bool


def read_build(path: Path) -> Build:
    """Read the build of a kernel."""
    content = json.loads(path.read_text())
    content["trimmed"] = bool(os.environ.get("TRIM") and content["trim_env"])
    return Build(**{field.name: content[field.name] for field in fields(Build)})


def environment(build: Build) -> dict[str, str]:
    """Return the environment that a kernel is built in."""
    archs = {build.arch_variable: ";".join(build.tokens)} if build.arch_variable else {}
    return {**os.environ, **build.env, **archs, **(build.trim_env if build.trimmed else {})}


def fail(what: str, why: str, do: str) -> NoReturn:
    """End the build with what happened, why, and what to do."""
    sys.exit(f"kernel: {what}\n  why: {why}\n  do:  {do}")


def prepare(build: Build) -> Path:
    """Fetch and patch a kernel's source; a git tree in SOURCE is changed in place.

    Returns:
        The folder of its setup.py or pyproject.toml.
    """
    tree = _fetched(build.source, build.sha256) if build.source else SOURCE
    for path in build.remove:
        if not (tree / path).is_dir():
            fail(
                f"there is no {path} to remove", f"{build.name} does not have it", "fix the recipe"
            )
        shutil.rmtree(tree / path)
    folders = [PATCHES, PATCHES / "trim"] if build.trimmed else [PATCHES]
    for patch in [patch for folder in folders for patch in sorted(folder.glob("*.patch"))]:
        apply(patch, tree)
    return tree / build.directory


def apply(patch: Path, tree: Path) -> None:
    """Apply a patch; one that does not fit to the letter is refused: its reason may be gone."""
    # --forward: never in reverse, where it is applied already. No backups, no rejects.
    command = ["patch", "--strip=1", "--fuzz=0", "--forward", "--no-backup-if-mismatch"]
    command += ["--reject-file=-", f"--input={patch}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        fail(
            f"{patch.name} can't be applied",
            done.stdout.strip().replace("\n", "; ") + done.stderr.strip(),
            "read its reason: remove the patch where upstream has fixed it, or write a new one",
        )
    print(f"kernel: applied {patch.name}")


def take_prebuilt(build: Build, wheels: Path) -> None:
    """Download the wheel that the recipe names, and refuse it when its hash is another."""
    wanted = WORK / "wanted.txt"
    wanted.write_text(f"{build.prebuilt} --hash=sha256:{build.sha256}\n")
    command = [*PIP, "download", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    subprocess.run([*command, f"--dest={wheels}", f"--requirement={wanted}"], check=True)


def _fetched(source: str, sha256: str) -> Path:
    """Download an sdist, refuse it when its hash is another, and unpack it."""
    wanted = WORK / "wanted.txt"
    wanted.write_text(f"{source} --hash=sha256:{sha256}\n")
    # pip runs a project's setup.py to name it; flash-attn's would look for a compiler.
    env = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    command = [*PIP, "download", "-q", "--no-deps", "--no-binary=:all:", "--require-hashes"]
    command += ["--no-build-isolation", f"--dest={WORK}", f"--requirement={wanted}"]
    subprocess.run(command, env=env, check=True)
    archive = next(WORK.glob("*.tar.gz"))
    with tarfile.open(archive) as opened:
        opened.extractall(WORK)  # its hash was verified
    return next(path for path in WORK.iterdir() if path.is_dir())

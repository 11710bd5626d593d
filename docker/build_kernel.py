"""Build the wheel of one kernel into WHEELS (/wheels): fetch, verify, patch and build its source.

    python build_kernel.py NAME [TREE]

NAME is the distribution; TREE its source where it is a git tree. What else there is to know stands
in the environment as docker-bake.json has it: for flash-attn FLASH_ATTN (its version),
FLASH_ATTN_SOURCE, _SHA256, _DIRECTORY, _ENV (NAME=value ...), _REMOVE (paths) and _REPLACE
(file|old|new ...).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--cert=/etc/ssl/certs/ca-certificates.crt")
WORK = Path(tempfile.gettempdir()) / "kernel"
WHEELS = Path(os.environ.get("WHEELS", "/wheels"))


def fetch(source: str, sha256: str) -> Path:
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


def patch(tree: Path, *, remove: list[str], replace: list[str]) -> None:
    """Apply a recipe's patches; one that changes nothing is refused, since its reason is gone."""
    for name in remove:
        shutil.rmtree(tree / name)
    for triple in replace:
        file, old, new = triple.split("|")
        text = (tree / file).read_text()
        if old not in text:
            sys.exit(f"build_kernel: {file} has no {old!r} to replace; mend the recipe's patch")
        (tree / file).write_text(text.replace(old, new))


def fact(name: str, suffix: str) -> str:
    """Give one fact of a kernel's recipe; empty where the recipe has none."""
    return os.environ.get(f"{name.upper().replace('-', '_')}{suffix}", "")


def prepare(name: str, tree: Path | None = None) -> Path:
    """Have a kernel's patched source; it is fetched when no tree is given."""
    if tree is None:
        tree = fetch(fact(name, "_SOURCE"), fact(name, "_SHA256"))
    replace = fact(name, "_REPLACE").split()
    patch(tree, remove=fact(name, "_REMOVE").split(), replace=replace)
    return tree / fact(name, "_DIRECTORY")


def environment(name: str) -> dict[str, str]:
    """Give the environment that a kernel is built in."""
    return {**os.environ, **dict(pair.split("=", 1) for pair in fact(name, "_ENV").split())}


def main(name: str, tree: Path | None) -> None:
    """Build one wheel."""
    WORK.mkdir(parents=True)
    project = prepare(name, tree)
    command = [*PIP, "wheel", "-v", "--no-deps", "--no-build-isolation", f"--wheel-dir={WHEELS}"]
    subprocess.run([*command, str(project)], env=environment(name), check=True)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else None)

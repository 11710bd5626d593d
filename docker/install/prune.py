"""Remove files from /opt/venv that an image never loads, and print the size of each removal.

    python prune.py ACCELERATOR

Run in the layer that installed the files: a later layer would hide them and save nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

from elf import drop_needed, has_symbol_table

SITE = Path("/opt/venv/lib/python3.11/site-packages")
# Where the Dockerfile mounts a stage that has strip(1); no image needs it.
BINUTILS = Path("/binutils")

# One file a layer: the Dockerfile mounts those of a layer and of the layers below it.
RULES = Path(__file__).parent / "unneeded"


@dataclass(frozen=True, slots=True)
class Rules:
    """What is removed from site-packages.

    Attributes:
        remove: (glob, why) of files and folders.
        unlink: file, needed, why: libraries that a library is made to forget.
        strip: globs of libraries without symbol tables.
    """

    remove: list[tuple[str, str]]
    unlink: list[dict[str, str]]
    strip: list[str]


def read_rules(accelerator: str) -> Rules:
    """Return the rules of all mounted files for one kind of image."""
    found = Rules([], [], [])
    for path in sorted(RULES.glob("*.toml")):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        for name in ("every_image", accelerator):
            found.remove.extend(table.get(name, {}).items())
        found.unlink.extend(table.get(f"{accelerator}_unlink", ()))
        found.strip.extend(table.get("strip", ()))
    return found


def size_bytes(path: Path) -> int:
    """Return the bytes of a file or a folder."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(
        size_bytes(Path(folder) / name) for folder, _, names in os.walk(path) for name in names
    )


def remove(glob: str) -> int:
    """Remove the matching files; return the bytes saved."""
    saved = 0
    for path in sorted(SITE.glob(glob)):
        saved += size_bytes(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return saved


def strip(glob: str) -> int:
    """Strip symbol tables from the matching files; return the bytes saved.

    A file that has none, or would not shrink, is not changed: rewriting one of an earlier layer
    would store it twice.
    """
    saved = 0
    triplet = str(sysconfig.get_config_var("MULTIARCH"))
    env = {"LD_LIBRARY_PATH": str(BINUTILS / "lib" / triplet)}
    for path in filter(has_symbol_table, sorted(SITE.glob(glob))):
        stripped = path.with_name(path.name + ".stripped")
        command = [str(BINUTILS / "bin/strip"), "--strip-unneeded", "-o", str(stripped), str(path)]
        subprocess.run(command, env=env, check=True)
        if stripped.stat().st_size < path.stat().st_size:
            saved += path.stat().st_size - stripped.stat().st_size
            stripped.replace(path)
        stripped.unlink(missing_ok=True)
    return saved


def main(accelerator: str) -> None:
    """Remove needed libraries and files, strip the rest; print a line for each change."""
    if not SITE.is_dir():
        sys.exit(f"prune: there is no {SITE}; the base image has another Python")
    rules = read_rules(accelerator)
    for unlink in rules.unlink:
        for path in sorted(SITE.glob(unlink["file"])):
            for name in drop_needed(path, unlink["needed"]):
                print(f"unlink: {name} from {unlink['file']}: {unlink['why']}")
    for glob, why in rules.remove:
        if saved := remove(glob):
            print(f"prune: {saved / 1e6:7.1f} MB  {glob}: {why}")
    for glob in rules.strip:
        if saved := strip(glob):
            print(f"strip: {saved / 1e6:7.1f} MB  {glob}")


if __name__ == "__main__":
    main(sys.argv[1])

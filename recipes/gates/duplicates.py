"""Refuse a library that is in two places: it is shipped twice, and its global state exists twice.

Two files are the same library if their bytes are equal, or if they have the same SONAME, in which
case the loader uses the one that is requested first.
"""

from __future__ import annotations

from collections.abc import Callable

from recipes.artifact.facts import Artifact, File
from recipes.gates import Expected, Gate, GateFinding

_NAME = "duplicates"
# Smaller ones are not checked: empty extension modules have the same bytes.
_LEAST_BYTES = 20_000


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Compare all shared libraries that a container sees."""
    there = [file for file in artifact.files if file.visible and file.elf and file.digest]
    same = _groups(there, lambda file: file.digest if file.bytes >= _LEAST_BYTES else "")
    faults = [_finding(files, "the same bytes") for files in same]
    known = {tuple(file.path for file in files) for files in same}
    for files in _groups(there, lambda file: file.elf.soname if file.elf else ""):
        if tuple(file.path for file in files) not in known:
            faults.append(
                _finding(files, f"the name {files[0].elf.soname}" if files[0].elf else "")
            )
    return tuple(faults)


def _groups(files: list[File], key: Callable[[File], str]) -> list[list[File]]:
    """Return the groups of files with the same key; files without a key are left out."""
    found: dict[str, list[File]] = {}
    for file in files:
        if value := key(file):
            found.setdefault(value, []).append(file)
    return [group for group in found.values() if len(group) > 1]


def _finding(files: list[File], what: str) -> GateFinding:
    others = ", ".join(file.path for file in files[:-1])
    return GateFinding(
        gate=_NAME,
        file=files[-1].path,
        found=f"{what} as {others}; {files[-1].bytes / 1e6:.1f} MB",
        needed="each library once",
        do="prune one of them, or say in recipes/allowed.toml why both must be there",
    )


GATE = Gate(name=_NAME, check=check)

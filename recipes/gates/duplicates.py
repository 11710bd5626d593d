"""Refuse one library in two places: it is shipped twice, and two copies of one state disagree.

Two files are one library when their bytes are the same, or when they answer to the same name
(SONAME), in which case the loader takes whichever is asked for first.
"""

from __future__ import annotations

from collections.abc import Callable

from recipes.artifact.facts import Artifact, File
from recipes.gates import Finding, Gate, Promise

_NAME = "duplicates"
# Smaller ones cost nothing: empty extension modules are alike.
_LEAST_BYTES = 20_000


def judge(artifact: Artifact, promise: Promise) -> tuple[Finding, ...]:
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
    """Return the files that share a key; those without one share nothing."""
    found: dict[str, list[File]] = {}
    for file in files:
        if value := key(file):
            found.setdefault(value, []).append(file)
    return [group for group in found.values() if len(group) > 1]


def _finding(files: list[File], what: str) -> Finding:
    others = ", ".join(file.path for file in files[:-1])
    return Finding(
        gate=_NAME,
        file=files[-1].path,
        found=f"{what} as {others}; {files[-1].bytes / 1e6:.1f} MB",
        needed="each library once",
        do="prune one of them, or say in recipes/allowed.toml why both must be there",
    )


GATE = Gate(name=_NAME, judge=judge)

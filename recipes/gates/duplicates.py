"""Refuse a library that is in two places: it is shipped twice, and its global state exists twice.

Two files are the same library if their bytes are equal, or if they have the same SONAME, in which
case the loader uses the one that is requested first.
"""

from __future__ import annotations

from recipes.artifact.facts import Artifact, File, visible_elves
from recipes.gates import ExpectedContents, GateFinding

# Smaller files are not compared by their bytes: empty extension modules are equal.
_MIN_BYTES = 20_000


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare all shared libraries that a container sees."""
    by_content: dict[str, list[File]] = {}
    by_name: dict[str, list[File]] = {}
    for file, elf in visible_elves(artifact.files):
        if file.digest and file.bytes >= _MIN_BYTES:
            by_content.setdefault(file.digest, []).append(file)
        if file.digest and elf.soname:
            by_name.setdefault(elf.soname, []).append(file)
    groups = [("the same bytes", files) for files in by_content.values()]
    groups += [
        (f"the name {soname}", files)
        for soname, files in by_name.items()
        if files not in by_content.values()
    ]
    return tuple(_finding(files, what) for what, files in groups if len(files) > 1)


def _finding(files: list[File], what: str) -> GateFinding:
    *others, last = files
    return GateFinding(
        file=last.path,
        found=f"{what} as {', '.join(file.path for file in others)}; {last.bytes / 1e6:.1f} MB",
        needed="each library once",
        do="prune one of them, or write in recipes/allowed.toml why both must be there",
    )

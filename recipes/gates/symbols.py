"""Refuse libraries that the loader can't load, which users see as `undefined symbol`.

Every library that a file needs must be where the loader finds it: on its RPATH or RUNPATH, among
those that Python and `import torch` have loaded already, or in the system's folders. Every symbol
that it needs must be defined by one of these, in the version that it needs. The GPU driver comes
with the machine, so its libraries and functions are recognized by their names. The plugins of
Debian's own programs, which those programs load, are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recipes.artifact.facts import Artifact, Elf, Symbol
from recipes.artifact.linking import DRIVER, LoaderView, loader_view
from recipes.gates import Expected, Gate, GateFinding

_NAME = "symbols"
# Checked by the gate `glibc`, with a better message.
_FLOOR = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_")
_SHOWN = 3
# Debian's own programs and their plugins, except Python's extensions.
_DEBIAN = re.compile(r"(usr/)?s?bin/|(usr/)?lib(64|exec)?/(?!.*python3)")


def skip_reason(artifact: Artifact, expected: Expected) -> str:
    """Return why the libraries that define symbols are not there; empty if they are."""
    if any(file.path.endswith("/libc.so.6") for file in (*artifact.files, *artifact.below)):
        return ""
    return "there is no image to look for symbols in: give one with ARCHIVE="


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Resolve every shared library and program of the artifact."""
    view = loader_view(artifact)
    below = {file.path for file in artifact.below}
    faults: list[GateFinding] = []
    for path, elf in view.elves.items():
        if path in below or _DEBIAN.match(path):
            continue
        # Without its libraries, most of a file's symbols are undefined.
        faults += [*_libraries(path, elf, view)] or [*_symbols(path, elf, view)]
    return tuple(faults)


def _libraries(path: str, elf: Elf, view: LoaderView) -> Iterator[GateFinding]:
    """Find needed libraries that are missing, or lack a version that is needed."""
    nowhere = [name for name in elf.needed if view.find(path, name) is None]
    if absent := [name for name in nowhere if name not in DRIVER]:
        do = "ship what it needs, or prune this file if nothing loads it"
        yield _finding(path, f"it needs {', '.join(absent)}", "each in the image", do)
    for name in elf.needed:
        where = view.find(path, name)
        if where is None:
            continue
        offered = view.elves[where].versions_defined
        lacking = [
            version
            for version in elf.versions_needed.get(name, ())
            if offered and version not in offered and not _FLOOR.match(version)
        ]
        if lacking:
            need = f"{', '.join(lacking)} in {where}"
            yield _finding(path, f"{name} without them", need, "build both for one another")


def _symbols(path: str, elf: Elf, view: LoaderView) -> Iterator[GateFinding]:
    """Find symbols that no library of this file, or of one that loads it, defines."""
    lacking = _lacking(elf, view.scope(path), view)
    for user in view.users(path) if lacking else ():
        lacking = [want for want in lacking if want in _lacking(elf, view.scope(user), view)]
    lacking = [want for want in lacking if not _FLOOR.match(want.version)]
    if lacking:
        shown = ", ".join(str(want) for want in lacking[:_SHOWN])
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        yield _finding(
            path,
            f"undefined symbol: {shown}{more}",
            "each defined by what it is loaded with",
            "build it against the libraries of this image: its torch, its CUDA",
        )


def _lacking(elf: Elf, scope: frozenset[str], view: LoaderView) -> list[Symbol]:
    drivers = [prefix for name, prefix in DRIVER.items() if name in scope]
    return [
        want
        for want in elf.wants
        if not view.is_defined(want, scope) and not any(re.match(p, want.name) for p in drivers)
    ]


def _finding(file: str, found: str, needed: str, do: str) -> GateFinding:
    return GateFinding(gate=_NAME, file=file, found=found, needed=needed, do=do)


GATE = Gate(name=_NAME, check=check, skip_reason=skip_reason)

"""Refuse libraries that the loader can't load, which users see as `undefined symbol`.

Every library that a file needs must be where the loader finds it: on its RPATH or RUNPATH, among
those that Python and `import torch` have loaded already, or in the system's folders. Every symbol
that it needs must be defined by one of these, in the version that it needs. The GPU driver comes
with the machine, so its libraries and functions are recognized by their names. The plugins of
Debian's own programs, which those programs load, are not checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from recipes.artifact.facts import Artifact, Elf, Symbol
from recipes.artifact.linking import DRIVER, LoaderView, loader_view
from recipes.gates import ExpectedContents, GateFinding

# The gate `glibc` checks these, with a better message.
_BASE_VERSIONS = re.compile(r"(GLIBC|GLIBCXX|CXXABI)_")
_MAX_LISTED = 3
# Debian's own programs and their plugins, except Python's extensions.
_DEBIAN = re.compile(r"(usr/)?s?bin/|(usr/)?lib(64|exec)?/(?!.*python3)")


def skip_reason(artifact: Artifact, expected: ExpectedContents) -> str:
    """Return why the libraries that define symbols are not there; empty if they are."""
    if any(file.path.endswith("/libc.so.6") for file in (*artifact.files, *artifact.below)):
        return ""
    return "there is no image to look for symbols in: add ARCHIVE=FILE"


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Resolve every shared library and program of the artifact."""
    view = loader_view(artifact, expected.platform)
    below = {file.path for file in artifact.below}
    findings: list[GateFinding] = []
    for path, elf in view.elves.items():
        if path not in below and not _DEBIAN.match(path):
            # Without its libraries, most of a file's symbols are undefined.
            findings += [*_check_libraries(path, elf, view)] or [*_check_symbols(path, elf, view)]
    return tuple(findings)


def _check_libraries(path: str, elf: Elf, view: LoaderView) -> Iterator[GateFinding]:
    """Find needed libraries that are missing, or lack a version that is needed."""
    libraries = {name: view.find(path, name) for name in elf.needed}
    missing = [name for name, place in libraries.items() if place is None and name not in DRIVER]
    if missing:
        do = "ship these libraries, or prune this file if nothing loads it"
        yield GateFinding(path, f"it needs {', '.join(missing)}", "each in the image", do)
    for name, place in libraries.items():
        defined = view.elves[place].versions_defined if place else frozenset()
        lacking = [
            version
            for version in elf.versions_needed.get(name, ())
            if defined and version not in defined and not _BASE_VERSIONS.match(version)
        ]
        if lacking:
            needed = f"{', '.join(lacking)} in {place}"
            yield GateFinding(path, f"{name} without them", needed, "build both for one another")


def _check_symbols(path: str, elf: Elf, view: LoaderView) -> Iterator[GateFinding]:
    """Find symbols that no library of this file, or of one that loads it, defines."""
    undefined = _undefined(elf.undefined, view.scope(path), view)
    for user in view.users(path) if undefined else ():
        undefined = _undefined(undefined, view.scope(user), view)
    undefined = [symbol for symbol in undefined if not _BASE_VERSIONS.match(symbol.version)]
    if undefined:
        names = ", ".join(str(symbol) for symbol in undefined[:_MAX_LISTED])
        rest = len(undefined) - _MAX_LISTED
        yield GateFinding(
            path,
            f"undefined symbol: {names}" + (f" and {rest} more" if rest > 0 else ""),
            "each defined by a library that is loaded with this file",
            "build it against the libraries of this image: its torch, its CUDA",
        )


def _undefined(symbols: Iterable[Symbol], scope: frozenset[str], view: LoaderView) -> list[Symbol]:
    """Return the symbols that a scope does not define; the driver defines its own."""
    drivers = [prefix for name, prefix in DRIVER.items() if name in scope]
    return [
        symbol
        for symbol in symbols
        if not view.is_defined(symbol, scope) and not any(re.match(p, symbol.name) for p in drivers)
    ]

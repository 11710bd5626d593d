"""Refuse files that need a newer C or C++ library than the base image has.

They would not load: "version `GLIBC_2.38' not found". The limit of an image is the newest version
that its own libc.so.6 and libstdc++.so.6 define; that of a wheelhouse is in recipes/bases.toml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from packaging.version import Version

from recipes.artifact.facts import Artifact, File
from recipes.gates import Expected, Gate, GateFinding

_NAME = "glibc"
_VERSION = re.compile(r"(GLIBC|GLIBCXX)_(\d[\d.]*)")
_LIBRARIES = {"GLIBC": "libc.so.6", "GLIBCXX": "libstdc++.so.6"}


def skip_reason(artifact: Artifact, expected: Expected) -> str:
    """Return why there is no limit to compare with; empty if there is one."""
    return (
        "" if _floor(artifact, expected) else f"recipes/bases.toml lacks {expected.plan.image.base}"
    )


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Compare the newest version that each file needs with the limit."""
    floor = _floor(artifact, expected)
    faults = []
    for file in artifact.files:
        if not file.visible or file.elf is None:
            continue
        asked = newest(v for versions in file.elf.versions_needed.values() for v in versions)
        for family in sorted(set(asked) & set(floor)):
            if asked[family] > floor[family]:
                faults.append(
                    GateFinding(
                        gate=_NAME,
                        file=file.path,
                        found=f"{family} {asked[family]}",
                        needed=f"at most {floor[family]}, which the base has",
                        do="build it in the toolchain stage, or take a wheel for an older system",
                    )
                )
    return tuple(faults)


def newest(names: Iterable[str]) -> dict[str, Version]:
    """Return the newest version of each family among names such as GLIBC_2.34."""
    found: dict[str, Version] = {}
    for name in names:
        if match := _VERSION.fullmatch(name):
            version = Version(match[2].rstrip("."))
            found[match[1]] = max(version, found.get(match[1], version))
    return found


def _floor(artifact: Artifact, expected: Expected) -> dict[str, Version]:
    """Return the versions of the image's libraries; those of the recipe if there is no image."""
    libraries = {
        family: file
        for family, name in _LIBRARIES.items()
        if (file := _library(artifact, name)) is not None
    }
    found: dict[str, Version] = {}
    for family, file in libraries.items():
        defined = file.elf.versions_defined if file.elf else frozenset()
        found |= {key: value for key, value in newest(defined).items() if key == family}
    if not found and expected.floor:
        return {"GLIBC": Version(expected.floor.glibc), "GLIBCXX": Version(expected.floor.glibcxx)}
    return found


def _library(artifact: Artifact, name: str) -> File | None:
    """Find a library of the system by its soname."""
    for file in (*artifact.files, *artifact.below):
        system = file.path.startswith(("usr/lib/", "lib/"))
        if system and file.visible and file.elf and file.elf.soname == name:
            return file
    return None


GATE = Gate(name=_NAME, check=check, skip_reason=skip_reason)

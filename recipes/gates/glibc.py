"""Refuse files that need a newer C or C++ library than the base image has.

They would not load: "version `GLIBC_2.38' not found". The limit of an image is the newest version
that its own libc.so.6 and libstdc++.so.6 define; that of a wheelhouse is in recipes/bases.toml.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from packaging.version import Version

from recipes.artifact.facts import Artifact, visible_elves
from recipes.gates import ExpectedContents, GateFinding

_VERSION = re.compile(r"(GLIBC|GLIBCXX)_(\d[\d.]*)")
_FAMILIES = {"libc.so.6": "GLIBC", "libstdc++.so.6": "GLIBCXX"}


def skip_reason(artifact: Artifact, expected: ExpectedContents) -> str:
    """Return why there is no limit to compare with; empty if there is one."""
    if _limits(artifact, expected):
        return ""
    return f"recipes/bases.toml lacks {expected.plan.image.base}"


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Compare the newest version that each file needs with the limit."""
    limits = _limits(artifact, expected)
    findings = []
    for file, elf in visible_elves(artifact.files):
        needed = _newest(v for versions in elf.versions_needed.values() for v in versions)
        findings += [
            GateFinding(
                file=file.path,
                found=f"{family} {needed[family]}",
                needed=f"at most {limits[family]}, which the base has",
                do="build it in the toolchain stage, or use a wheel for an older system",
            )
            for family in sorted(needed.keys() & limits.keys())
            if needed[family] > limits[family]
        ]
    return tuple(findings)


def _newest(names: Iterable[str]) -> dict[str, Version]:
    """Return the newest version of each family among names such as GLIBC_2.34."""
    found: dict[str, Version] = {}
    for name in names:
        if match := _VERSION.fullmatch(name):
            version = Version(match[2].rstrip("."))
            found[match[1]] = max(version, found.get(match[1], version))
    return found


def _limits(artifact: Artifact, expected: ExpectedContents) -> dict[str, Version]:
    """Return the versions of the image's libraries; those of the recipe if there is no image."""
    found: dict[str, Version] = {}
    for file, elf in visible_elves((*artifact.below, *artifact.files)):
        family = _FAMILIES.get(elf.soname)
        if family and file.path.startswith(("usr/lib/", "lib/")):
            newest = _newest(elf.versions_defined)
            found |= {key: version for key, version in newest.items() if key == family}
    if not found and expected.base:
        return {
            "GLIBC": Version(expected.base.glibc),
            "GLIBCXX": Version(expected.base.glibcxx),
        }
    return found

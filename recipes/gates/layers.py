"""Refuse files that no run needs, in any layer: a file that a later layer deletes is still shipped.

These are static libraries, caches and logs of package managers, tests of dependencies, and files of
1 MB or more that a later layer replaces or deletes. Programs with setuid or setgid bits are refused
too, because a container may run as any user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recipes.artifact.facts import Artifact, File
from recipes.gates import ExpectedContents, GateFinding

_SITE = r".*site-packages/"
# What it is, its paths, the fix.
_WASTE = (
    (
        "a static library",
        r".*\.a",
        "remove it in the layer that installs it (docker/install/unneeded)",
    ),
    (
        "a cache of a package manager",
        r"(var/cache/(apt/.*\.(deb|bin)|uv/.*|ldconfig/.*)|var/lib/apt/lists/.*[^/]"
        r"|(.*/)?\.cache/(pip|uv|huggingface|torch)/.*|root/\.(cache|npm|cargo)/.*)",
        "mount a cache instead (RUN --mount=type=cache), or delete it in the same RUN",
    ),
    (
        "a log",
        r"(var/log/(apt/.*|dpkg\.log|alternatives\.log|pip.*)|(.*/)?pip-?(log|debug)[\w.-]*\.txt|.*\.pip/pip\.log)",
        "delete it in the RUN that writes it",
    ),
    (
        "a test of a dependency",
        _SITE + r"([^/]+/)*(tests?|testing/tests)/(.*/)?(test_[^/]*|[^/]*_test|conftest)\.py[co]?",
        "add its folder to docker/install/unneeded",
    ),
    ("a package archive", r"(?!.*/ensurepip/_bundled/)(.*\.(whl|deb|egg))", "install from a mount"),
)
_PATTERNS = tuple((what, re.compile(path), do) for what, path, do in _WASTE)
_MAX_HIDDEN_BYTES = 1_000_000
_SETID = 0o6000
# glibc has empty archives such as libpthread.a, which linkers may name (size in bytes).
_EMPTY_ARCHIVE = 8


def check(artifact: Artifact, expected: ExpectedContents) -> tuple[GateFinding, ...]:
    """Check every file of every layer."""
    visible = {file.path for file in artifact.files if file.visible}
    return tuple(
        finding for file in artifact.files for finding in _check_file(file, visible, artifact)
    )


def _check_file(file: File, visible: set[str], artifact: Artifact) -> Iterator[GateFinding]:
    size = f"{file.bytes / 1e6:.1f} MB" if file.bytes >= 1e5 else f"{file.bytes} bytes"
    layer = f"layer {file.layer + 1} ({artifact.layers[file.layer].name})"
    if file.kind == "file" and file.bytes > _EMPTY_ARCHIVE:
        for what, pattern, do in _PATTERNS:
            if pattern.fullmatch(file.path):
                yield GateFinding(file.path, f"{what} of {size} in {layer}", "none", do)
                break
    if not file.visible and file.bytes >= _MAX_HIDDEN_BYTES:
        change = "replaces" if file.path in visible else "deletes"
        yield GateFinding(
            file.path,
            f"{size} in {layer}, which a later layer {change}",
            "each file shipped once",
            "change it in the layer that installs it",
        )
    if file.visible and file.kind == "file" and file.mode & _SETID:
        do = "chmod a-s it in the python stage of docker/Dockerfile"
        yield GateFinding(file.path, f"mode {file.mode:04o}", "neither setuid nor setgid", do)

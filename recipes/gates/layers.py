"""Refuse files that no run needs, in any layer: a file that a later layer deletes is still shipped.

These are static libraries, caches and logs of package managers, tests of dependencies, and files of
1 MB or more that a later layer replaces or deletes. Programs with setuid or setgid bits are refused
too, because a container may run as any user.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from recipes.artifact.facts import Artifact, File
from recipes.gates import Expected, Gate, GateFinding

_NAME = "layers"
_SITE = r".*site-packages/"
# (what it is, paths, the fix)
_WASTE = (
    (
        "a static library",
        r".*\.a",
        "remove it in the layer that installs it (docker/install/prune.py)",
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
        "add its folder to docker/install/prune.py",
    ),
    ("a package archive", r"(?!.*/ensurepip/_bundled/)(.*\.(whl|deb|egg))", "install from a mount"),
)
_PATTERNS = tuple((what, re.compile(path), do) for what, path, do in _WASTE)
_HIDDEN_BYTES = 1_000_000
_SETID = 0o6000
# glibc has empty archives such as libpthread.a, which linkers may name (size in bytes).
_EMPTY_ARCHIVE = 8


def check(artifact: Artifact, expected: Expected) -> tuple[GateFinding, ...]:
    """Check every file of every layer."""
    again = {file.path for file in artifact.files if file.visible}
    return tuple(fault for file in artifact.files for fault in _faults(file, again, artifact))


def _faults(file: File, again: set[str], artifact: Artifact) -> Iterator[GateFinding]:
    if file.kind == "file" and file.bytes > _EMPTY_ARCHIVE:
        for what, pattern, do in _PATTERNS:
            if pattern.fullmatch(file.path):
                yield _finding(
                    file, f"{what} of {_size(file)} in {_where(file, artifact)}", "none", do
                )
                break
    if not file.visible and file.bytes >= _HIDDEN_BYTES:
        fate = "replaces" if file.path in again else "deletes"
        yield _finding(
            file,
            f"{_size(file)} in {_where(file, artifact)}, which a later layer {fate}",
            "each file shipped once",
            "change it in the layer that installs it",
        )
    if file.visible and file.kind == "file" and file.mode & _SETID:
        do = "chmod a-s it in the python stage of docker/Dockerfile"
        yield _finding(file, f"mode {file.mode:04o}", "neither setuid nor setgid", do)


def _size(file: File) -> str:
    return f"{file.bytes / 1e6:.1f} MB" if file.bytes >= 1e5 else f"{file.bytes} bytes"


def _where(file: File, artifact: Artifact) -> str:
    return f"layer {file.layer + 1} ({artifact.layers[file.layer].name})"


def _finding(file: File, found: str, needed: str, do: str) -> GateFinding:
    return GateFinding(gate=_NAME, file=file.path, found=found, needed=needed, do=do)


GATE = Gate(name=_NAME, check=check)

"""Read from git what the labels of an image say about its source; needs the standard library only.

The version is pyproject.toml's if the build is that of a commit, else `dev`.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import tomllib
from pathlib import Path

# What the build reads, as in docker/Dockerfile.dockerignore, and the patches of kernels.
BUILT_FROM = (
    "attnimg",
    "docker",
    "pyproject.toml",
    "requirements/images",
    "tests/image/inside",
    "recipes/patches",
)


def source_labels(root: Path) -> dict[str, str]:
    """Return VERSION, REVISION, CREATED and SOURCE_DATE_EPOCH for docker-bake.json.

    A checkout has changes if git sees a changed file anywhere, or a new file that the build reads.
    REVISION then ends in -dirty. CREATED is the time of the commit, or that of SOURCE_DATE_EPOCH
    in the environment. Without git, REVISION is `unknown`, and CREATED the start of 1980.
    """
    try:
        commit, seconds = _git(root, "log", "-1", "--format=%H %ct").split()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        added = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *BUILT_FROM)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        reason = getattr(error, "stderr", "") or str(error) or "git log prints no commit"
        print(
            f"build: the labels will say version dev, revision unknown: git can't read {root}: "
            f"{reason.strip().splitlines()[0]}",
            file=sys.stderr,
        )
        return _labels("dev", "unknown", 315532800)
    if changed or added:
        files = sorted({line[3:] for line in (changed + added).splitlines()})
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        print(
            f"build: the labels will say version dev: changed since the last commit: "
            f"{', '.join(files[:3])}{more}",
            file=sys.stderr,
        )
        return _labels("dev", f"{commit}-dirty", int(seconds))
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return _labels(project["version"], commit, int(seconds))


def _labels(version: str, revision: str, seconds: int) -> dict[str, str]:
    epoch = os.environ.get("SOURCE_DATE_EPOCH") or str(seconds)
    if not epoch.isdecimal():
        sys.exit(
            f"build: SOURCE_DATE_EPOCH is {epoch!r}\n  why: needed seconds since 1970\n"
            "  do:  omit it: the time of the commit is used"
        )
    created = datetime.datetime.fromtimestamp(int(epoch), tz=datetime.UTC)
    return {
        "VERSION": version,
        "REVISION": revision,
        "CREATED": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "SOURCE_DATE_EPOCH": epoch,
    }


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

"""Read from git what the labels of an image say about its source; needs the standard library only.

The version is pyproject.toml's if the build is that of a commit, else `dev`.
"""

from __future__ import annotations

import datetime
import os
import re
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

# 9999-12-31T23:59:59Z: later years have no date in Python.
_LAST_SECOND = 253402300799


def source_labels(root: Path) -> dict[str, str]:
    """Return VERSION, REVISION, CREATED and SOURCE_DATE_EPOCH for docker-bake.json.

    A checkout has changes if git sees a changed file anywhere, or a file that the build reads and
    the commit does not have, ignored or not. REVISION then ends in -dirty. CREATED is the time of
    the commit, or that of SOURCE_DATE_EPOCH in the environment. Without git, or in a folder of
    another repository, REVISION is `unknown`, and CREATED the start of 1980.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel").removesuffix("\n")
        if Path(top).resolve() != root.resolve():
            raise ValueError(f"it is a folder of another repository, {top}")
        commit, seconds = _git(root, "log", "-1", "--format=%H %ct").split()
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
        added = _added(root)
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
    if not re.fullmatch(r"[0-9]{1,12}", epoch) or int(epoch) > _LAST_SECOND:
        sys.exit(
            f"build: SOURCE_DATE_EPOCH is {epoch!r}\n"
            f"  why: needed seconds since 1970, 0 to {_LAST_SECOND}\n"
            "  do:  omit it: the time of the commit is used"
        )
    created = datetime.datetime.fromtimestamp(int(epoch), tz=datetime.UTC)
    return {
        "VERSION": version,
        "REVISION": revision,
        "CREATED": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "SOURCE_DATE_EPOCH": epoch,
    }


def _added(root: Path) -> str:
    """Return the lines of git status for files of the build that no commit has."""
    options = ("--porcelain", "--untracked-files=all", "--ignored")
    lines = _git(root, "status", *options, "--", *BUILT_FROM).splitlines(keepends=True)
    # The build context has no __pycache__, but all else that git ignores.
    return "".join(line for line in lines if "__pycache__" not in Path(line[3:]).parts)


def _git(root: Path, *arguments: str) -> str:
    # GIT_DIR and the like name another repository; GIT_CONFIG_... may say that this one is safe.
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("GIT_") or name.startswith("GIT_CONFIG_")
    }
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout

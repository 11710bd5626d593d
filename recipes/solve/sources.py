"""Fetch the git trees that an image's kernels are built from, as their recipes pin them.

A commit is a hash of its content, so any clone can be used: one on this disk, or GitHub's.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan, Kernel

# docker/build.py uses the folders KERNEL-source-COMMIT in it.
FOLDER = Path("build/sources")


def fetch_sources(plan: ImagePlan, *, root: Path, clones: Path | None) -> Iterator[Path]:
    """Write the source tree of each kernel that is built from git, unless it exists.

    Args:
        plan: of the image.
        root: the checkout; trees go to FOLDER in it.
        clones: a folder with git repositories at any depth up to three, searched by commit; None
            to fetch from GitHub.

    Yields:
        The folder of each tree.

    Raises:
        AttnimgError: a commit is in no clone, or can't be fetched (code "no-source").
    """
    for kernel in (step.kernel for step in plan.steps if step.kernel.form == "git"):
        commit = kernel.source.partition("@")[2]
        tree = root / FOLDER / f"{kernel.name}-source-{commit}"
        if not tree.is_dir():
            tree.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
                _write_tree(Path(temporary) / "tree", kernel, clones=clones)
                (Path(temporary) / "tree").rename(tree)
        yield tree


def _write_tree(tree: Path, kernel: Kernel, *, clones: Path | None) -> None:
    _extract(tree, kernel.source, kernel.paths, clones=clones)
    for path, source in kernel.submodules.items():
        # csrc/cutlass/include: the folder include of what is cloned at csrc/cutlass.
        inside = path.rpartition("/")[2]
        with tempfile.TemporaryDirectory(dir=tree.parent) as temporary:
            _extract(Path(temporary) / "tree", source, (inside,), clones=clones)
            shutil.rmtree(tree / path, ignore_errors=True)
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / "tree" / inside).rename(tree / path)


def _extract(tree: Path, source: str, paths: Iterable[str], *, clones: Path | None) -> None:
    """Write the files of owner/name@commit that match git's pathspecs."""
    repository, _, commit = source.partition("@")
    with tempfile.TemporaryDirectory() as folder:
        clone = _clone(repository, commit, clones=clones, into=Path(folder))
        archive = Path(folder) / "tree.tar"
        _git(clone, "archive", f"--output={archive}", commit, "--", *paths, source=source)
        with tarfile.open(archive) as opened:
            opened.extractall(tree, filter="data")


def _clone(repository: str, commit: str, *, clones: Path | None, into: Path) -> Path:
    source = f"{repository}@{commit}"
    if clones is None:
        _git(into, "init", "-q", source=source)
        address = f"https://github.com/{repository}.git"
        _git(into, "fetch", "-q", "--depth=1", address, commit, source=source)
        return into
    for pattern in ("*", "*/*", "*/*/*"):
        for folder in sorted(path.parent for path in clones.glob(f"{pattern}/HEAD")):
            command = ["git", "-C", str(folder), "cat-file", "-e", f"{commit}^{{commit}}"]
            if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return folder
    raise AttnimgError(
        f"{repository} is in no clone",
        why=f"needed commit {commit}, found it in no git repository below {clones}",
        do=f"clone {repository} there, or omit FROM to fetch it from GitHub",
        code="no-source",
        exit_code=1,
    )


def _git(folder: Path, *arguments: str, source: str) -> None:
    process = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise AttnimgError(
            f"the source {source} can't be fetched",
            why=f"git {arguments[0]}: {process.stderr.strip()}",
            do="check the network, or name a folder with clones: make sources/NAME FROM=DIR",
            code="no-source",
            exit_code=1,
        )

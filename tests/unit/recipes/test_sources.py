"""Git trees for kernels: by commit, from any clone, only what the build reads."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from recipes.facts import ImagePlan
from recipes.read import read_recipes
from recipes.solve.plan import solve
from recipes.solve.sources import fetch_sources

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)


def commit(folder: Path, files: dict[str, str]) -> str:
    """Make a repository with one commit, and return its id."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "One"]):
        subprocess.run([*git, *arguments], check=True)
    done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def clones(tmp_path: Path) -> Path:
    """Two repositories, one two folders down and bare."""
    clones = tmp_path / "clones"
    commit(clones / "kernel", {"hopper/setup.py": "pass", "docs/big": "big", "README.md": "hi"})
    commit(clones / "plain", {"include/cute.h": "cute", "test/t": "t"})
    subprocess.run(
        ["git", "clone", "-q", "--bare", clones / "plain", clones / "more/cutlass"], check=True
    )
    subprocess.run(["rm", "-r", clones / "plain"], check=True)
    return clones


def head(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def plan(clones: Path) -> ImagePlan:
    """A hopper image whose FlashAttention-3 comes from those two."""
    kernel = replace(
        RECIPES.kernels["flash-attn-3"],
        source=f"some/kernel@{head(clones / 'kernel')}",
        paths=("hopper", "README.md"),
        submodules={"csrc/cutlass/include": f"some/cutlass@{head(clones / 'more/cutlass')}"},
    )
    made = solve(RECIPES.images["hopper"], RECIPES)
    step = next(step for step in made.steps if step.kernel.name == "flash-attn-3")
    return replace(made, steps=(replace(step, kernel=kernel),))


def test_a_tree_has_what_its_build_reads_and_no_more(
    tmp_path: Path, clones: Path, plan: ImagePlan
) -> None:
    (tree,) = fetch_sources(plan, root=tmp_path, clones=clones)
    files = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())
    assert files == ["README.md", "csrc/cutlass/include/cute.h", "hopper/setup.py"]
    assert tree.name == f"flash-attn-3-source-{head(clones / 'kernel')}"


def test_a_tree_that_is_there_is_left_alone(tmp_path: Path, clones: Path, plan: ImagePlan) -> None:
    (tree,) = fetch_sources(plan, root=tmp_path, clones=clones)
    (tree / "mine").touch()
    assert [*fetch_sources(plan, root=tmp_path, clones=tmp_path / "nowhere")] == [tree]
    assert (tree / "mine").exists()


def test_a_commit_that_no_clone_has_is_named_and_leaves_nothing(
    tmp_path: Path, clones: Path, plan: ImagePlan
) -> None:
    subprocess.run(["rm", "-r", clones / "more"], check=True)
    with pytest.raises(AttnimgError, match="some/cutlass is in no clone") as caught:
        list(fetch_sources(plan, root=tmp_path, clones=clones))
    assert head(clones / "kernel") not in caught.value.why
    assert list((tmp_path / "build/sources").iterdir()) == []

"""`make lock` finds the hash of a CPU build of torch, and replaces none that is known."""

from __future__ import annotations

import hashlib
import shutil
import tomllib
import zipfile
from pathlib import Path

import pytest
from loopback import serve_files

from recipes.read import read_recipes
from recipes.solve.plan import solve_all
from recipes.solve.torch_wheels import lock_torch_wheels

ROOT = Path(__file__).resolve().parents[3]
PLANS = solve_all(read_recipes(ROOT))
NAME = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_{}.whl"
ARM64 = NAME.format("aarch64")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout with torch.toml alone."""
    (tmp_path / "root/recipes").mkdir(parents=True)
    shutil.copy(ROOT / "recipes/torch.toml", tmp_path / "root/recipes")
    return tmp_path / "root"


def write_wheel(folder: Path, name: str) -> str:
    """Write a wheel that pip reads; return its SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"torch-{name.split('-')[1]}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as archive:
        version = name.split("-")[1]
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()


def hashes(root: Path) -> dict[str, object]:
    text = (root / "recipes/torch.toml").read_text(encoding="utf-8")
    wheels: dict[str, object] = tomllib.loads(text)["2.13.0"]["cpu"]["wheels"]
    return wheels


@pytest.mark.parametrize("place", ["folder", "index"])
def test_the_hash_is_written_and_comments_stay(root: Path, tmp_path: Path, place: str) -> None:
    sha256 = write_wheel(tmp_path / "simple/torch", ARM64)
    write_wheel(tmp_path / "simple/torch", NAME.format("x86_64"))
    before = hashes(root)
    with serve_files(tmp_path) as (url, _):
        where = {"folder": str(tmp_path / "simple/torch"), "index": f"{url}/simple"}
        (line,) = lock_torch_wheels(PLANS, root=root, env={"TORCH_INDEX": where[place]})
    assert line == f"{ARM64} has sha256 {sha256}"
    assert hashes(root) == before | {ARM64: [sha256]}
    assert "# The CPU build, for the image `cpu`." in (root / "recipes/torch.toml").read_text()


@pytest.mark.parametrize(
    ("file", "why"),
    [
        pytest.param("", "pip found none in", id="an empty folder"),
        pytest.param(NAME.format("x86_64"), "pip found none in", id="the other platform's alone"),
        pytest.param(
            ARM64.replace("+cpu", ""), "pip found none in", id="the CUDA build of that version"
        ),
        pytest.param(
            ARM64.replace("+cpu-", "+cpu-1-"), "found torch-2.13.0+cpu-1-cp311-cp311",
            id="a file of another name",
        ),
    ],
)  # fmt: skip
def test_without_the_wheel_it_stays_unresolved_with_the_reason(
    root: Path, tmp_path: Path, file: str, why: str
) -> None:
    (tmp_path / "folder").mkdir()
    if file:
        write_wheel(tmp_path / "folder", file)
    before = hashes(root)
    (line,) = lock_torch_wheels(PLANS, root=root, env={"TORCH_INDEX": str(tmp_path / "folder")})
    assert line.startswith(f"{ARM64} stays unresolved: ")
    assert why in line
    assert hashes(root) == before

"""The patches of the recipes: each fits its source to the letter, and is still needed.

A patch that upstream has made needless fails here, with what to do. Needs a package index, and for
kernels that come from git their trees in build/sources (`make sources/hopper`); no image, no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from recipes.facts import Kernel
from recipes.read import read_recipes

RECIPES = read_recipes(ROOT)
PATCHED = [kernel for kernel in RECIPES.kernels.values() if kernel.patches or kernel.remove]


def download(kernel: Kernel, folder: Path, *, form: str) -> Path:
    """Download an sdist or a wheel without building anything."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--no-binary=:all:" if form == "sdist" else "--only-binary=:all:"]
    command += ["--dest", str(folder), kernel.source]
    env = {**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    subprocess.run(command, env=env, check=True, capture_output=True)
    return next(folder.iterdir())


@pytest.fixture(scope="module", params=[kernel.name for kernel in PATCHED])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpatched tree of one kernel."""
    kernel = RECIPES.kernels[request.param]
    if kernel.form == "git":
        commit = kernel.source.partition("@")[2]
        tree = ROOT / "build/sources" / f"{kernel.name}-source-{commit}"
        if not tree.is_dir():
            pytest.skip(f"{kernel.source} is not here: make sources/hopper")
        return tree
    folder = tmp_path_factory.mktemp(kernel.name)
    with tarfile.open(download(kernel, folder, form="sdist")) as opened:
        opened.extractall(folder / "tree", filter="data")
    return next((folder / "tree").iterdir())


def kernel_of(source: Path) -> Kernel:
    """Find the recipe whose tree this is."""
    name = source.name.replace("_", "-")
    return max((k for k in PATCHED if name.startswith(k.name)), key=lambda k: len(k.name))


def test_every_patch_fits_to_the_letter(source: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    subprocess.run(["cp", "-r", source, tree], check=True)
    for patch in kernel_of(source).patches:
        done = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "--forward"],
            cwd=tree, input=patch.diff, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{patch.name}: {done.stdout}"


def test_what_is_removed_is_there(source: Path) -> None:
    for removal in kernel_of(source).remove:
        assert (source / removal.path).is_dir(), removal.path


@pytest.mark.parametrize("source", ["flash-attn", "sageattention"], indirect=True)
def test_the_patch_for_newer_cxx_is_still_needed(source: Path) -> None:
    requested = {
        int(text) for text in re.findall(r"-std=c\+\+(\d+)", (source / "setup.py").read_text())
    }
    newest = max(torch.cxx_standard for torch in RECIPES.torch.values())
    assert max(requested) < newest, "setup.py asks for enough by itself: remove cxx20.patch"


@pytest.mark.parametrize("source", ["flash-attn"], indirect=True)
def test_the_cute_folder_of_flash_attn_still_collides(tmp_path: Path, source: Path) -> None:
    with zipfile.ZipFile(
        download(RECIPES.kernels["flash-attn-4"], tmp_path, form="wheel")
    ) as wheel:
        theirs = {name for name in wheel.namelist() if name.startswith("flash_attn/cute/")}
    ours = {str(path.relative_to(source)) for path in (source / "flash_attn/cute").glob("*.py")}
    assert ours & theirs, "nothing collides any more: do not remove flash_attn/cute"


@pytest.mark.parametrize("source", ["flash-attn-3"], indirect=True)
def test_flash_attention_3_still_compiles_two_units_for_sm_80(source: Path) -> None:
    assert "rule = 'cuda_compile_sm80_sm90'" in (source / "hopper/setup.py").read_text()

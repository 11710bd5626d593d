"""ROCm: torch's build and its compiler are data; `make lock` asks the index for the hashes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback import serve_files
from rocm_wheels_index import TORCH, TRITON, write_wheels

from attnimg.errors import AttnimgError
from recipes.facts import Recipes, Unresolved
from recipes.read import read_recipes
from recipes.render.bake import bake_file
from recipes.render.image_lists import matrix_json
from recipes.render.mounted import mounted_files
from recipes.solve.lock import fixed_versions, pinned_versions, rocm_torch_pins
from recipes.solve.plan import refuse_unresolved, solve
from recipes.solve.rocm import lock_rocm

ROOT = Path(__file__).resolve().parents[3]
RECIPES = read_recipes(ROOT)
IMAGE = RECIPES.images["rocm"]
HASHES = {TORCH: ("1" * 64, "2" * 64), TRITON: ("3" * 64,)}


def with_build(**changes: Any) -> Recipes:
    """Change torch's ROCm build; rocm=None removes it."""
    torch = RECIPES.torch["2.14.1"]
    assert torch.rocm is not None
    build = changes["rocm"] if "rocm" in changes else replace(torch.rocm, **changes)
    return replace(RECIPES, torch={**RECIPES.torch, "2.14.1": replace(torch, rocm=build)})


LOCKED = solve(IMAGE, with_build(hashes=HASHES))


def test_the_plan_is_of_the_release_that_torch_was_built_with() -> None:
    plan = solve(IMAGE, RECIPES)
    assert (plan.abi, plan.lock) == ("cp311-torch2.14-rocm7.2", "2.14.1-rocm7.2")
    assert (plan.toolkit, plan.nvcc, plan.rocm) == ("7.2", "", RECIPES.rocm["7.2"])
    (step,) = plan.steps
    assert step.tokens == ("gfx90a", "gfx942", "gfx950")


def test_without_hashes_it_is_not_published() -> None:
    with pytest.raises(AttnimgError) as caught:
        refuse_unresolved(solve(IMAGE, RECIPES))
    assert "rocm_hashes is unresolved: PyTorch's index for ROCm 7.2" in caught.value.why
    assert not [key for key in LOCKED.unresolved if "hashes" in key]


@pytest.mark.parametrize(
    ("recipes", "torch", "says"),
    [
        (with_build(rocm=None), "2.14.1", "torch 2.14.1 has no ROCm build in recipes/torch.toml"),
        (RECIPES, "2.15.0", "torch 2.15.0 has no ROCm build in recipes/torch.toml"),
        (with_build(release="6.4"), "2.14.1",
         "ROCm 6.4 of torch 2.14.1 is not in recipes/rocm.toml; known: 7.2"),
    ],
    ids=["no build", "another torch", "a release without a compiler"],
)  # fmt: skip
def test_what_the_data_lack_is_refused(recipes: Recipes, torch: str, says: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        solve(replace(IMAGE, torch=torch), recipes)
    assert says in caught.value.why


def test_a_kernel_is_compiled_by_amd_s_compiler_from_the_generic_stage() -> None:
    targets = json.loads(bake_file((solve(IMAGE, RECIPES),)))["target"]
    assert targets["rocm_flash-attn"]["target"] == "kernel"
    release = RECIPES.rocm["7.2"]
    assert targets["rocm_flash-attn"]["args"] == {
        "KERNEL": "flash-attn",
        "BUILDER": "rocm-toolchain",
        "ROCM_APT": release.apt,
        "ROCM_KEY": release.apt_key,
        "ROCM_KEY_FINGERPRINT": release.apt_key_fingerprint,
        "ROCM_PACKAGES": " ".join(release.packages),
    }
    dockerfile = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^FROM python AS rocm-toolchain$", dockerfile, re.MULTILINE)
    assert "rocm_devel" not in targets


def test_the_hashes_are_in_the_lock_file_and_the_build_of_the_image() -> None:
    assert rocm_torch_pins(LOCKED) == (
        f"{TORCH} \\\n    --hash=sha256:{'1' * 64} \\\n    --hash=sha256:{'2' * 64}\n"
        f"{TRITON} \\\n    --hash=sha256:{'3' * 64}\n"
    )
    assert rocm_torch_pins(solve(IMAGE, RECIPES)) == ""
    build = json.loads(mounted_files(LOCKED, lock="")["docker/images/rocm/rocm.json"])
    assert build["hashes"] == {key: list(value) for key, value in HASHES.items()}
    assert (build["requirements"], build["unresolved"]) == ([TORCH, TRITON], "")


def test_nobody_may_replace_torch_or_its_triton() -> None:
    assert pinned_versions(LOCKED, lock="")["triton-rocm"] == "3.8.0"
    fixed = fixed_versions(LOCKED, lock="")
    assert (fixed["torch"], fixed["triton-rocm"]) == ("2.14.1+rocm7.2", "3.8.0")


@pytest.mark.parametrize(
    ("hashes", "runner", "skip"),
    [
        (Unresolved("no index"), {"rocm": {"label": "big"}}, "no index"),
        (HASHES, {"rocm": {"label": "big"}}, ""),
        (HASHES, {}, "no runner in recipes/runners.toml for rocm"),
    ],
    ids=["no hashes", "hashes and a runner", "no runner"],
)
def test_ci_skips_it_with_the_reason(hashes: Any, runner: Any, skip: str) -> None:
    plan = solve(IMAGE, with_build(hashes=hashes))
    (entry,) = json.loads(matrix_json((plan,), runners={"build": runner}))["images"]
    assert (entry["skip"], entry["publish"]) == (skip, False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout's recipes, to be changed."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def name_index(copy: Path, url: str) -> None:
    path = copy / "recipes/torch.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("https://download.pytorch.org/whl/rocm7.2", url), encoding="utf-8")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """An index with both wheels: its address, and their hashes."""
    hashes = write_wheels(tmp_path / "index")
    with serve_files(tmp_path / "index") as (url, _):
        yield url, hashes


def test_make_lock_writes_the_hashes_of_the_index(
    copy: Path, served: tuple[str, dict[str, str]]
) -> None:
    name_index(copy, served[0])
    before = (copy / "recipes/torch.toml").read_text(encoding="utf-8")
    (line,) = lock_rocm(read_recipes(copy), root=copy)
    assert line == "torch 2.14.1 for ROCm has 2 hashes"
    build = read_recipes(copy).torch["2.14.1"].rocm
    assert build is not None
    assert build.hashes == {key: (value,) for key, value in served[1].items()}
    after = (copy / "recipes/torch.toml").read_text(encoding="utf-8")
    lines = [line for line in before.splitlines() if not line.startswith("hashes = ")]
    assert [line for line in after.splitlines() if not line.startswith("hashes = ")] == lines
    # Again: nothing changes.
    list(lock_rocm(read_recipes(copy), root=copy))
    assert (copy / "recipes/torch.toml").read_text(encoding="utf-8") == after


@pytest.mark.parametrize("broken", ["no server", "no triton"])
def test_an_index_that_has_not_both_changes_nothing(
    copy: Path, tmp_path: Path, served: tuple[str, dict[str, str]], broken: str
) -> None:
    name_index(copy, served[0] if broken == "no triton" else "http://127.0.0.1:9/none")
    if broken == "no triton":
        shutil.rmtree(tmp_path / "index/triton-rocm")
    before = (copy / "recipes/torch.toml").read_text(encoding="utf-8")
    (line,) = lock_rocm(read_recipes(copy), root=copy)
    assert line.startswith("the hashes of torch 2.14.1 for ROCm stay as they are: ")
    assert (copy / "recipes/torch.toml").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("hashes", "says"),
    [
        (f'{{ "{TORCH}" = ["{"1" * 64}"] }}', f"rocm.hashes: {TRITON}: needed"),
        (f'{{ "{TORCH}" = ["{"1" * 64}"], "{TRITON}" = [] }}', f"rocm.hashes.{TRITON}: found"),
        (f'{{ "{TORCH}" = ["x"], "{TRITON}" = ["{"1" * 64}"] }}', f"rocm.hashes.{TORCH}: found"),
        (f'{{ "torch==2.13.0+rocm7.2" = ["{"1" * 64}"] }}', "torch==2.13.0+rocm7.2: needed"),
    ],
    ids=["one is missing", "no hash", "no hash's form", "another release"],
)
def test_wrong_hashes_are_refused(copy: Path, hashes: str, says: str) -> None:
    path = copy / "recipes/torch.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"(?m)^hashes = .*", f"hashes = {hashes}", text), encoding="utf-8")
    with pytest.raises(AttnimgError) as caught:
        read_recipes(copy)
    assert says in caught.value.why


def test_a_key_s_fingerprint_has_forty_digits(copy: Path) -> None:
    path = copy / "recipes/rocm.toml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("CA8BB472", "CA8B"), encoding="utf-8")
    with pytest.raises(AttnimgError, match="is not a valid recipe") as caught:
        read_recipes(copy)
    assert "apt_key_fingerprint: found" in caught.value.why


def test_the_command_prints_the_plan() -> None:
    command = [sys.executable, "-m", "recipes", "solve", "rocm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "code gfx90a gfx942 gfx950" in done.stdout

"""The records of `make test/arm64` and `make test/arm64-kernel`, and the page that quotes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.gates import gate_names
from recipes.read import read_recipes
from recipes.solve.plan import solve

ROOT = Path(__file__).parents[3]
RECORD = json.loads((ROOT / "docs/measured/arm64.json").read_text(encoding="utf-8"))
IMAGE, KERNEL, UNITS = RECORD["image"], RECORD["kernel"], RECORD["units"]
PAGE = " ".join((ROOT / "docs/build-images.md").read_text(encoding="utf-8").split())
ARM, AMD = "linux/arm64", "linux/amd64"


def test_the_commands_that_need_no_torch_ran_on_arm64() -> None:
    assert (IMAGE["architecture"], IMAGE["machine"]) == ("arm64", ["aarch64"])
    assert {name.split()[0] for name in IMAGE["commands"]} == {"check", "explain", "doctor"}
    assert {command["exit_code"] for command in IMAGE["commands"].values()} == {0}


def test_the_image_had_all_packages_of_its_lock_files() -> None:
    texts = [
        (ROOT / f"requirements/images/{layer}-2.13.0-cpu-arm64.txt").read_text(encoding="utf-8")
        for layer in ("torch", "stack")
    ]
    assert IMAGE["packages"] == sum(text.count("==") for text in texts)
    assert IMAGE["torch"] is ("\ntorch==" in texts[0]), "make test/arm64"


@pytest.mark.parametrize(
    ("target", "processor", "machine"),
    [(ARM, "ARM aarch64", "aarch64"), (AMD, "x86-64", "x86_64")],
)
def test_each_wheel_passed_the_gates_for_its_platform_and_no_other(
    target: str, processor: str, machine: str
) -> None:
    built = KERNEL[target]
    assert (built["processor"], built["wheel"].endswith(f"_{machine}.whl")) == (processor, True)
    assert {"glibc", "machine-code", "processor"} <= set(built["gates"]) <= gate_names()
    assert not [found for findings in built["gates"].values() for found in findings]
    assert len(built["gates_for_the_other"]) == 2, "its library, and its name"


def test_both_wheels_have_the_same_gpu_functions_of_this_recipe() -> None:
    recipes = read_recipes(ROOT)
    plan = solve(recipes.images[KERNEL["image"]], recipes)
    (key,) = (step.key for step in plan.steps if step.kernel.name == KERNEL["kernel"])
    assert KERNEL[AMD]["key"] == key, "make test/arm64-kernel"
    assert KERNEL[ARM]["gpu_functions"] == KERNEL[AMD]["gpu_functions"]
    assert 0 < KERNEL["equal_gpu_functions"] <= KERNEL[AMD]["gpu_functions"]


def test_the_page_has_the_figures_of_the_record() -> None:
    seconds = [
        f"| {way} | {' | '.join(map(str, sources.values()))} |"
        for way, sources in UNITS["cpu_seconds"].items()
    ]
    quoted = [
        *seconds,
        f"{KERNEL['equal_gpu_functions']} of {KERNEL[ARM]['gpu_functions']} GPU functions",
        f"{KERNEL[ARM]['cpu_seconds']} s of CPU for `linux/arm64`, {KERNEL[AMD]['cpu_seconds']} s",
        f"{IMAGE['packages']} packages",
        f"in {round(IMAGE['build_seconds'] / 60)} minutes",
    ]
    assert [text for text in quoted if text not in PAGE] == []

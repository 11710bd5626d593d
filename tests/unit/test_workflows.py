"""CI's matrix comes from the recipes, and a missing GPU runner is a skip that is written down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def part(name: str) -> str:
    command = [sys.executable, str(ROOT / ".github" / "matrix.py"), name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_recipe_is_built() -> None:
    built = {entry["image"] for entry in json.loads(part("images"))}
    assert {path.stem for path in (ROOT / "recipes" / "images").glob("*.toml")} <= built


def test_a_gpu_without_a_runner_is_recorded_and_not_run() -> None:
    assert all(entry["runner"] for entry in json.loads(part("gpu")))
    run = {(entry["image"], entry["arch"]) for entry in json.loads(part("gpu"))}
    recorded = set(re.findall(r"\| (\S+) \| (\S+) \| no runner", part("untested")))
    matrix = json.loads((ROOT / ".github" / "matrix.json").read_text())
    assert run | recorded == {(entry["image"], entry["arch"]) for entry in matrix["gpu"]}
    assert not run & recorded


def test_a_part_that_does_not_exist_is_refused_in_three_parts() -> None:
    command = [sys.executable, str(ROOT / ".github" / "matrix.py"), "images2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert [mark in done.stderr for mark in ("why:", "do:", "Traceback")] == [True, True, False]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(path: Path) -> None:
    pins = re.findall(r"uses: (\S+)", path.read_text())
    assert pins
    assert [pin for pin in pins if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", pin)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_step_is_a_make_target_that_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w./%-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = re.sub("#.*", "", path.read_text())
    wanted = re.findall(r"\bmake \"?([\w./-]+)", steps)
    assert wanted
    known = {target.split("/")[0] for target in targets}
    assert [name for name in wanted if name.split("/")[0] not in known] == []

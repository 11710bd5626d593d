"""Tests that compile FlashAttention-4's kernels, without a GPU: `make test/fa4-cache`.

FA4_PYTHON is a Python interpreter with FlashAttention-4 and its dependencies, in the versions of
the images; FA4_KERNELS, if set, is a complete set to test as well: the output of
docker/precompiled/build.py or of the stage fa4-compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DOCKER = ROOT / "docker"
SETS = DOCKER / "images"
sys.path.insert(0, str(DOCKER))


@dataclass(frozen=True)
class FA4Build:
    """A set that was compiled here, and the arguments to compile it again."""

    python: Path
    set_file: Path
    state: Path
    out: Path

    def build(self) -> list[str]:
        """Build the set, and return the lines that were printed."""
        command = [self.python, "-B", "-m", "precompiled.build"]
        paths = [self.set_file, self.state, self.out]
        return run(*command, *paths, PYTHONPATH=f"{DOCKER}:{ROOT}").splitlines()

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "manifest.json").read_text())


def run(*command: object, **env: str) -> str:
    """Run a program that must succeed; return its stdout."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def python() -> Path:
    """An interpreter with FlashAttention-4."""
    if "FA4_PYTHON" not in os.environ:
        pytest.skip("FA4_PYTHON names no interpreter; make test/fa4-cache sets it")
    return Path(os.environ["FA4_PYTHON"]).absolute()


@pytest.fixture(scope="session")
def built(python: Path, tmp_path_factory: pytest.TempPathFactory) -> FA4Build:
    """One shape with every kind of kernel of the hopper image's: gpt-oss's sliding layers."""
    shape = {"head_dim": 64, "heads_per_kv": 8, "window": True, "sinks": True}
    return part_of("hopper", "sm_90", shape, python, folder=tmp_path_factory.mktemp("fa4"))


@pytest.fixture(scope="session")
def built_for_b200(python: Path, tmp_path_factory: pytest.TempPathFactory) -> FA4Build:
    """One call of sm_100, with an enum in the key of one of its kernels."""
    shape = {"head_dim": 64, "heads_per_kv": 1}
    asked = {"varlen": [False], "gradient": [True]}
    folder = tmp_path_factory.mktemp("fa4-b200")
    return part_of("blackwell", "sm_100", shape, python, folder=folder, **asked)


def part_of(
    image: str,
    device: str,
    shape: dict[str, Any],
    python: Path,
    *,
    folder: Path,
    **axes: list[bool],
) -> FA4Build:
    """Compile the shapes of an image's set for a target that are like `shape`."""
    whole = json.loads((SETS / image / "fa4_kernels.json").read_text())
    target = whole["targets"][device]
    shapes = [found for found in target["shapes"] if found | shape == found]
    assert shapes, f"{image} compiles nothing like {shape}"
    asked = whole | axes | {"targets": {device: target | {"shapes": shapes}}}
    (folder / "set.json").write_text(json.dumps(asked))
    part = FA4Build(python, folder / "set.json", folder / "state", folder / "out")
    part.build()
    return part

"""Tests that compile FlashAttention-4's kernels, without a GPU: `make test/fa4-cache`.

FA4_PYTHON names an interpreter that has FlashAttention-4 and all it needs, in the versions of the
images; FA4_KERNELS, if set, a finished set to test as well: a folder that docker/fa4_cache/build.py
made, or the stage fa4-kernels.
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

ROOT = Path(__file__).parents[2]
FA4_CACHE = ROOT / "docker" / "fa4_cache"
sys.path.insert(0, str(FA4_CACHE))


@dataclass(frozen=True)
class Built:
    """A set that was compiled here, and how that can be done once more."""

    python: Path
    set_file: Path
    state: Path
    out: Path

    def build(self) -> list[str]:
        """Build, and give what was printed."""
        command = [self.python, "-B", FA4_CACHE / "build.py", self.set_file, self.state, self.out]
        return run(*command, PYTHONPATH=str(ROOT / "attnimg" / "probe")).splitlines()

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "manifest.json").read_text())


def run(*command: object, **env: str) -> str:
    """Run a program that has to succeed; give its stdout."""
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
def built(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The smallest set that has every kind of kernel, of the hopper image's."""
    asked = {"head_dims": [64], "heads_per_kv": [4], "causal": [True]}
    return part_of("hopper", asked, python, folder=tmp_path_factory.mktemp("fa4"))


@pytest.fixture(scope="session")
def built_for_b200(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One call of sm_100, with an enum in the key of one of its kernels."""
    asked = {"head_dims": [64], "heads_per_kv": [1], "causal": [True], "varlen": [False]}
    asked |= {"gradient": [True], "targets": ["sm_100"]}
    return part_of("blackwell", asked, python, folder=tmp_path_factory.mktemp("fa4-b200"))


def part_of(image: str, asked: dict[str, Any], python: Path, *, folder: Path) -> Built:
    """Compile some of an image's set, for all its targets or for those named."""
    whole = json.loads((FA4_CACHE / f"{image}.json").read_text())
    targets = {name: whole["targets"][name] for name in asked.get("targets", whole["targets"])}
    (folder / "set.json").write_text(json.dumps(whole | asked | {"targets": targets}))
    part = Built(python, folder / "set.json", folder / "state", folder / "out")
    part.build()
    return part

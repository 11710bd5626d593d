"""docker/build.py refuses in words what it can know before Docker is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "why", "do"),
    [
        pytest.param(
            "hoper", "found no target of that name", "recipes/images/hoper.toml", id="typo"
        ),
        pytest.param(
            "rocm", "PyPI has no torch for ROCm", "recipes/images/rocm.toml", id="no torch"
        ),
    ],
)
def test_an_image_that_can_not_be_built_is_refused_in_words(name: str, why: str, do: str) -> None:
    done = subprocess.run(
        [sys.executable, "docker/build.py", name, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert first.startswith("build: ")
    assert why in second
    assert do in third


def test_an_image_that_can_be_built_is_not_refused() -> None:
    command = [sys.executable, "docker/build.py", "hopper", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

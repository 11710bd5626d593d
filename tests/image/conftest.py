"""Tests of a built image, named by the variable IMAGE; they run it with this machine's Docker.

    IMAGE=attnimg:cpu pytest tests/image        make test/cpu

The folder inside/ is part of the image: `attnimg selftest` runs it there, not this run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# No user of this machine or of the image, so that code that needs an entry in /etc/passwd fails.
UID, GID = 4321, 4399

collect_ignore = ["inside"]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def image() -> str:
    """The image under test."""
    name = os.environ.get("IMAGE")
    if not name:
        pytest.skip("IMAGE names no image; make test/cpu sets it")
    return name


@pytest.fixture(scope="session")
def docker(image: str) -> Run:
    """Run the image: docker(arguments of it, options=those of docker run)."""

    def run(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = ["docker", "run", "--rm", *options, image, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    return run


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's untrained model."""
    folder = tmp_path_factory.mktemp("demo") / "untrained"
    program = ROOT / "examples" / "demo" / "make_model.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def workspace(tmp_path: Path, untrained: Path) -> Path:
    """A folder of user UID with the demo's config, data and model, as a person would mount it."""
    return make_workspace(tmp_path / "workspace", untrained)


def make_workspace(folder: Path, untrained: Path) -> Path:
    """Write the folder of the fixture `workspace`, and return it."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(untrained, folder / "outputs" / "demo" / "untrained")
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, UID, GID)
    return folder


def faults(report: str) -> list[str]:
    """Return the failures of `attnimg doctor`, except that no GPU is visible in this run."""
    lines = [line.strip() for line in report.splitlines()]
    return [line for line in lines if line.startswith("FAIL") and "no GPU is visible" not in line]


def mounted(workspace: Path) -> tuple[str, ...]:
    """Return the options of a run as user UID on that folder, without network."""
    return (
        "--network=none",
        f"--user={UID}:{GID}",
        f"--volume={workspace}:/workspace",
        "--env=OMP_NUM_THREADS=1",
    )


def losses(metrics: Path) -> list[tuple[int, float]]:
    """Read (step, loss) of a run."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]

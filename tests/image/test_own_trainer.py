"""Scripts of examples/trainer train in an image made FROM this one, without network."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GID, ROOT, UID, mounted

TAG = "attnimg-test-trainer"


@pytest.fixture(scope="module")
def trainer(image: str) -> Iterator[str]:
    """The image that examples/trainer/Dockerfile describes."""
    examples = ROOT / "examples"
    done = subprocess.run(
        ["docker", "build", "--progress=plain", f"--file={examples / 'trainer' / 'Dockerfile'}",
         f"--build-arg=IMAGE={image}", f"--tag={TAG}", str(examples)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    yield TAG
    subprocess.run(["docker", "rmi", "--force", TAG], capture_output=True, check=False)


def run(
    trainer: str, workspace: Path, *command: str, environment: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the image on a folder as a user that the image does not know."""
    os.chown(workspace, UID, GID)
    variables = [f"--env={variable}" for variable in environment]
    return subprocess.run(
        ["docker", "run", "--rm", *mounted(workspace), *variables, trainer, *command],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_trl_trains_with_the_callback(trainer: str, tmp_path: Path) -> None:
    done = run(trainer, tmp_path)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)", done.stdout)]
    assert len(losses) >= 3
    assert losses == sorted(losses, reverse=True)
    written = json.loads((tmp_path / "outputs" / "trl_sft" / "attnimg.json").read_text())
    assert (written["chosen"]["backend"], written["verified"]) == ("sdpa", True)


def test_plain_pytorch_trains(trainer: str, tmp_path: Path) -> None:
    done = run(trainer, tmp_path, "python", "/app/trainer/plain_pytorch.py")
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r": loss ([\d.]+)", done.stdout)]
    assert len(losses) >= 3
    assert losses == sorted(losses, reverse=True)
    assert "proof: sdpa passed" in done.stderr


def test_a_backend_that_does_not_fit_ends_the_run(trainer: str, tmp_path: Path) -> None:
    script = ("python", "/app/trainer/trl_sft.py")
    done = run(trainer, tmp_path, *script, environment=("ATTNIMG_BACKEND=flash_attention_3",))
    assert done.returncode == 1
    assert "flash_attention_3 cannot be used here" in done.stderr
    assert not (tmp_path / "outputs" / "trl_sft" / "attnimg.json").exists()

"""A container that is killed or stopped goes on where it was, with the same losses."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from conftest import Run, losses, make_workspace, mounted

RUN = (
    "train",
    "examples/demo/demo.yaml",
    "max_steps=6",
    "save_steps=2",
    "logging_steps=1",
    "val_set_size=0",
    "eval_steps=null",
    "sequence_len=128",
    "auto_resume_from_checkpoints=true",
)


@pytest.fixture(scope="module")
def whole(docker: Run, untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nobody ended early."""
    workspace = make_workspace(tmp_path_factory.mktemp("whole") / "workspace", untrained)
    done = docker(*RUN, "output_dir=whole", options=mounted(workspace))
    assert done.returncode == 0, done.stderr
    return workspace / "whole"


@pytest.mark.parametrize(
    ("how", "code"),
    [pytest.param("kill", 137, id="SIGKILL"), pytest.param("stop", 143, id="docker stop")],
)
def test_a_run_that_ends_early_is_resumed_to_the_same_losses(
    docker: Run, image: str, workspace: Path, whole: Path, how: str, code: int
) -> None:
    name = f"attnimg-test-{how}"
    container = ["docker", "run", "--rm", "--name", name, *mounted(workspace), image]
    process = subprocess.Popen([*container, *RUN, "output_dir=cut"], stderr=subprocess.DEVNULL)
    while not (workspace / "cut" / "checkpoint-2").exists() and process.poll() is None:
        time.sleep(0.01)
    subprocess.run(["docker", how, name], check=True, capture_output=True)
    assert process.wait(60) == code, "it must have been ended from outside"

    resumed = docker(*RUN, "output_dir=cut", options=mounted(workspace))
    assert resumed.returncode == 0, resumed.stderr
    assert losses(workspace / "cut/metrics.jsonl") == losses(whole / "metrics.jsonl")
    weights = "model.safetensors"
    assert (workspace / "cut" / weights).read_bytes() == (whole / weights).read_bytes()

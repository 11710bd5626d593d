"""A run that is killed at any moment and resumed trains as if nothing had happened.

The run that they are compared with is a program; the others run in forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked_runs import Fork

PROGRAM = Path(__file__).parents[1] / "fixtures" / "tiny_run.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Dropout draws random numbers in each step, so a lost RNG state would show; logging_steps 3 and
# save_steps 2 make checkpoints fall inside a window of summed losses.
KEYS = {
    "max_steps": 12,
    "save_steps": 2,
    "logging_steps": 3,
    "adapter": "lora",
    "lora_dropout": 0.3,
    "gradient_accumulation_steps": 2,
    "val_set_size": 0.1,
    "eval_steps": 4,
    "save_total_limit": 2,
    "auto_resume_from_checkpoints": True,
}


def arguments(folder: Path, **keys: object) -> list[str]:
    settings = (f"{key}={json.dumps(value)}" for key, value in keys.items())
    return [str(PROGRAM), str(folder), *settings]


def start(folder: Path, **keys: object) -> Fork:
    return Fork(arguments(folder, **keys), env=ENV)


def finish(folder: Path, **keys: object) -> None:
    process = start(folder, **keys)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def curve(out: Path) -> list[dict[str, float]]:
    """What must be the same, bit for bit: everything but clocks and memory."""
    same = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens", "filled")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in same if key in line} for line in lines]


def wait_for(process: Fork, there: Path) -> None:
    while not there.exists() and process.poll() is None:
        time.sleep(0.0005)


def killed_at(tmp_path: Path, moment: str) -> Path:
    """Kill a run at a moment; some last a millisecond, and a missed one is tried again."""
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        process = start(folder, **KEYS, delay=0.02)
        wait_for(process, folder / moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == -signal.SIGKILL:
            return folder
    raise AssertionError(f"never saw {moment}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run nobody interrupted, with two epochs and a bit."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(
        [sys.executable, *arguments(folder, **KEYS)],
        env=ENV,
        check=True,
        timeout=120,
    )
    return folder


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("out/receipt.json", id="before the first step"),
        pytest.param("out/.partial/checkpoint-4", id="when a checkpoint is begun"),
        pytest.param(
            "out/.partial/checkpoint-4/optimizer.json", id="while a checkpoint is written"
        ),
        pytest.param("out/.partial/checkpoint-4/manifest.json", id="while a manifest is written"),
        pytest.param("out/checkpoint-6", id="when a checkpoint has just appeared"),
        pytest.param("out/.partial/removed-checkpoint-2", id="while an old one is removed"),
        pytest.param("out/.partial/model", id="while the final model is written"),
    ],
)
def test_a_killed_run_resumes_to_the_same_curve(whole: Path, tmp_path: Path, moment: str) -> None:
    folder = killed_at(tmp_path, moment)

    finish(folder, **KEYS)

    assert curve(folder / "out") == curve(whole / "out")
    weights = "adapter_model.safetensors"
    assert (folder / "out" / weights).read_bytes() == (whole / "out" / weights).read_bytes()
    assert not (folder / "out" / ".partial").exists()


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
    ],
)
def test_a_stopped_run_saves_and_resumes_to_the_same_curve(
    whole: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path, **KEYS, delay=0.1)
    wait_for(process, tmp_path / "out/checkpoint-4")
    time.sleep(0.15)  # into step 5, where no checkpoint is due
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]

    assert process.returncode == code, errors
    newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    assert f"step {newest.name[11:]}" in errors
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert receipt["status"] == "stopped"
    finish(tmp_path, **KEYS)
    assert curve(tmp_path / "out") == curve(whole / "out")


def test_a_signal_does_not_wait_for_a_long_evaluation(whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path, **KEYS, delay=20.0, during="evaluation")
    metrics = tmp_path / "out/metrics.jsonl"
    while not (metrics.exists() and '"step": 3' in metrics.read_text()):
        time.sleep(0.01)
    time.sleep(1.0)  # step 4 evaluates: its first batch sleeps 20 s
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    assert process.returncode == 143
    assert time.monotonic() - began < 30, "the batch under way may end; the others are left"
    finish(tmp_path, **KEYS)
    assert curve(tmp_path / "out") == curve(whole / "out")


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, max_steps=3, delay=30.0)
    wait_for(process, tmp_path / "out/receipt.json")
    time.sleep(3)  # into the first step, which takes 30 s
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # two signals within 2 s count as one wish
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    assert process.returncode == 143
    assert time.monotonic() - began < 15


EPOCHS = {"num_epochs": 2, "max_steps": None, "micro_batch_size": 8, "save_steps": 1,
          "val_set_size": 0.1, "auto_resume_from_checkpoints": True}  # fmt: skip


@pytest.mark.parametrize(
    ("logged", "slow"),
    [
        pytest.param(5, "evaluation", id="during it, with the step saved"),
        pytest.param(6, "training", id="after it, with its line written"),
    ],
)
def test_a_run_killed_around_an_epoch_s_evaluation_has_it_once(
    tmp_path: Path, logged: int, slow: str
) -> None:
    """A step is saved before its epoch is closed by an evaluation; five steps an epoch here."""
    finish(tmp_path, **EPOCHS, output_dir=str(tmp_path / "whole"))
    whole = curve(tmp_path / "whole")
    evaluations = [line["step"] for line in whole if "eval_loss" in line]
    assert evaluations == [5, 10]
    metrics = tmp_path / "out/metrics.jsonl"
    process = start(tmp_path, **EPOCHS, delay=0.2, during=slow)
    while not (tmp_path / "out/checkpoint-5").exists() or (
        len(metrics.read_text().splitlines()) < logged
    ):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(metrics.read_text().splitlines()) == logged
    finish(tmp_path, **EPOCHS)
    assert curve(tmp_path / "out") == whole

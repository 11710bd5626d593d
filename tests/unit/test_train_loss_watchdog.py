"""Test that a run whose loss stays above a threshold stops, and that other runs do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnimg.errors import AttnimgError
from attnimg.train.loss_watchdog import LossWatchdog

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, losses, make_model, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


@pytest.mark.parametrize(
    ("patience", "losses", "ends"),
    [
        pytest.param(2, [9, 9], [False, True], id="as many as the patience"),
        pytest.param(3, [9, 9, 1, 9, 9], [False] * 5, id="a low loss begins the count again"),
        pytest.param(None, [9, 9, 9], [False, False, True], id="three by default"),
        pytest.param(1, [5, 5.1], [False, True], id="the threshold itself is accepted"),
    ],
)
def test_high_losses_in_a_row_end_a_run(
    patience: int | None, losses: list[float], ends: list[bool]
) -> None:
    watchdog = LossWatchdog(5.0, patience)
    found = []
    for loss in losses:
        watchdog.add(torch.tensor(loss / 2))
        watchdog.add(torch.tensor(loss / 2))
        found.append(watchdog.count_step(lambda value: value))
        assert not watchdog.count_step(lambda value: value) or found[-1], "counted twice"
    assert found == ends


def test_the_mean_of_all_processes_decides() -> None:
    watchdog = LossWatchdog(5.0, 1)
    watchdog.add(torch.tensor(9.0))
    assert not watchdog.count_step(lambda value: value / 2)
    assert watchdog.loss == 4.5


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="each step logged"),
        pytest.param({"logging_steps": 10, "gradient_accumulation_steps": 2}, id="none logged"),
    ],
)
def test_a_run_stops_without_another_checkpoint(
    tiny: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    keys = {"save_steps": 1, "save_total_limit": 1, "warmup_steps": 0, **keys}
    run(tiny, tmp_path, max_steps=1, **keys)
    model = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(AttnimgError, match="since step 2") as caught:
        run(tiny, tmp_path, max_steps=6, resume_from_checkpoint=True, loss_watchdog_threshold=1.0,
            loss_watchdog_patience=2, **keys)  # fmt: skip
    error = caught.value
    assert (error.code, error.exit_code) == ("loss-too-high", 1)
    assert "needed at most 1 in one of 2 steps in a row" in error.why
    assert "checkpoint-2" in error.why
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    assert lines(tmp_path)[-1]["step"] == 3
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["status"], receipt["error"]["code"]) == ("failed", "loss-too-high")
    assert (tmp_path / "model.safetensors").read_bytes() == model, "the model is that of step 1"


def test_the_count_continues_after_resuming(tiny: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"save_steps": 2, "loss_watchdog_threshold": 1.0}
    run(tiny, tmp_path, max_steps=2, **keys)
    with pytest.raises(AttnimgError, match="since step 1") as caught:
        run(tiny, tmp_path, max_steps=6, resume_from_checkpoint=True, **keys)
    assert "at step 3" in caught.value.why


def test_other_runs_train_as_without_it(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "without")
    expected = losses(tmp_path / "without")
    assert expected[2] > expected[5], "the loss must fall for this test"
    # High for the first three steps, of which four would be too many.
    run(tiny, tmp_path / "with", loss_watchdog_threshold=min(expected[:3]) - 1e-4,
        loss_watchdog_patience=6)  # fmt: skip
    assert losses(tmp_path / "with") == expected

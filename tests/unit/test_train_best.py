"""Test which checkpoints a run keeps, and which model it saves at its end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.train.arguments import plan_steps
from attnimg.train.engine import RunCallback

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, losses, make_model, run

# The loss rises from an early step on.
RISING: dict[str, Any] = {"learning_rate": 0.3, "lr_scheduler": "constant", "max_steps": 5,
                          "val_set_size": 0.1, "eval_steps": 1}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("checkpoint-*"))


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def evaluations(out: Path) -> dict[int, float]:
    return {int(line["step"]): line["eval_loss"] for line in lines(out) if "eval_loss" in line}


def test_the_best_model_is_saved_at_the_end(tiny: Path, tmp_path: Path) -> None:
    keys = {**RISING, "load_best_model_at_end": True, "save_steps": 5, "save_total_limit": 1}
    result = run(tiny, tmp_path, **keys)
    found = evaluations(tmp_path)
    best = min(found, key=lambda step: found[step])
    assert best < 5, "the loss must rise for this test"
    assert checkpoints(tmp_path) == [f"checkpoint-{best}", "checkpoint-5"]
    assert model(tmp_path) == model(tmp_path / f"checkpoint-{best}")
    assert model(tmp_path) != model(tmp_path / "checkpoint-5")
    assert f"the model is checkpoint-{best}" in result.notes[0]
    # The same, where all steps are done already.
    (tmp_path / "model.safetensors").unlink()
    run(tiny, tmp_path, resume_from_checkpoint=True, **keys)
    assert model(tmp_path) == model(tmp_path / f"checkpoint-{best}")


def test_a_share_of_the_run_is_a_number_of_steps(tiny: Path, tmp_path: Path) -> None:
    keys = {**RISING, "learning_rate": 1e-3, "eval_steps": 0.25, "save_steps": 0.5}
    run(tiny, tmp_path, **keys)
    assert sorted(evaluations(tmp_path)) == [2, 4, 5]  # a quarter of 5 steps, rounded up
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-5"]


def test_the_last_model_is_saved_if_it_is_the_best(tiny: Path, tmp_path: Path) -> None:
    keys = {**RISING, "learning_rate": 1e-3, "max_steps": 2, "load_best_model_at_end": True}
    result = run(tiny, tmp_path, save_steps=9, **keys)
    assert "that of the last step" in result.notes[0]
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert model(tmp_path) == model(tmp_path / "checkpoint-2")


def test_strategy_best_saves_where_the_loss_is_lowest(tiny: Path, tmp_path: Path) -> None:
    result = run(tiny, tmp_path, save_steps=None, save_strategy="best", **RISING)
    found, lowest, expected = evaluations(tmp_path), float("inf"), []
    for step in sorted(found):
        if found[step] < lowest:
            lowest = found[step]
            expected.append(f"checkpoint-{step}")
    assert checkpoints(tmp_path) == expected
    assert 0 < len(expected) < 5
    assert result.notes == ()


def test_strategy_best_has_no_interval() -> None:
    config = Config(save_strategy="best", val_set_size=0.1)
    found = plan_steps(config, rows=8, world=1, validation=True)
    assert (found.save_strategy, found.save_steps) == ("best", None)


@pytest.mark.parametrize("first", [True, False])
def test_the_first_step_is_saved_if_requested(tiny: Path, tmp_path: Path, first: bool) -> None:
    run(tiny, tmp_path, save_steps=2, max_steps=3, save_first_step=first)
    assert checkpoints(tmp_path) == [
        *(["checkpoint-1"] if first else []), "checkpoint-2", "checkpoint-3"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        pytest.param({}, [], id="never"),
        pytest.param({"gc_collect_steps": 2}, [2, 3, 4, 6, 6], id="every other step as well"),
        pytest.param({"gc_collect_steps": -1}, [3, 6, 6], id="before evaluations and at the end"),
    ],
)
def test_garbage_is_collected_where_requested(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any],
    steps: list[int],
) -> None:  # fmt: skip
    found: list[int] = []
    collect = RunCallback._collect_garbage

    def counted(callback: RunCallback) -> None:
        found.append(callback.engine.state.global_step)
        collect(callback)

    monkeypatch.setattr(RunCallback, "_collect_garbage", counted)
    common = {"max_steps": 6, "val_set_size": 0.1, "eval_steps": 3}
    run(tiny, tmp_path / "out", torch_empty_cache_steps=1, **common, **keys)
    assert found == steps
    assert len(losses(tmp_path / "out")) == 6

"""Kill runs by SIGKILL: resumed, each ends bit for bit as one that nobody killed.

`make test` kills at fixed points of a run. ATTACK_KILLS, 50 in `make attack`, is a number of kills
at random times.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from attacked import Outcome
from generated import SEED

KILLS = int(os.environ.get("ATTACK_KILLS", "0"))


def saved(step: int) -> tuple[str, ...]:
    """Return what exists after the save of a step."""
    return (f"out/checkpoint-{step}",)


def saving(step: int) -> tuple[str, ...]:
    """Return what exists within the save of a step, or after it, where that is too short to see."""
    return (f"out/.partial/checkpoint-{step}", *saved(step))


KEYS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,
    "adapter": "lora",
    "lora_dropout": 0.3,
    "lora_r": 4,
    "auto_resume_from_checkpoints": True,
}
# For each run, what it is killed at, one after another: the end of a save, and within one.
POINTS = ((saved(1), saving(6)), (saving(3),))
SAME = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")


def result(folder: Path) -> tuple[object, bytes]:
    """What must be the same: the curve without its clocks, and the weights."""
    lines = [json.loads(x) for x in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: line[key] for key in SAME if key in line} for line in lines]
    return curve, (folder / "out" / "adapter_model.safetensors").read_bytes()


def fixed_points() -> Iterator[list[dict[str, Any]]]:
    """Yield the kills of each run of `make test`, as options of the command."""
    for run in POINTS:
        yield [{"until": paths} for paths in run]


def random_times(seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Yield kills at times within a run of `seconds`, without end."""
    draw = random.Random(SEED)
    while True:
        yield [{"seconds": draw.uniform(0.2, seconds)} for _ in range(draw.randint(1, 3))]


def test_killed_runs_end_as_one_that_nobody_killed(
    train: Callable[..., Outcome],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    done = train(whole, **KEYS)
    assert done.code == 0, done.err
    kills = runs = 0
    failed = list[str]()
    for moments in random_times(done.seconds) if KILLS else fixed_points():
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        for moment in moments:
            outcome = train(folder, **KEYS, options=moment)
            kills += not outcome.ended
            if outcome.ended and outcome.code:
                break
        last = train(folder, **KEYS, options={"seconds": 120})
        if last.code or result(folder) != result(whole):
            failed.append(f"killed at {moments}: exit code {last.code}, {last.err[-300:]}")
        if KILLS and kills >= KILLS:
            break
    assert kills >= (KILLS or sum(map(len, POINTS)))
    points = f"{kills} kills at {'random times' if KILLS else 'fixed points'}"
    record_property("attack", ["runs killed", runs, runs - len(failed), points])
    assert not failed, "\n".join(failed)

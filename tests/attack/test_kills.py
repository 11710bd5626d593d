"""Kill runs by SIGKILL at random moments: resumed, each ends bit for bit as one that nobody killed.

ATTACK_KILLS is the number of kills, 3 by default and 50 in `make attack`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacked import Outcome
from generated import SEED

KILLS = int(os.environ.get("ATTACK_KILLS", "3"))
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
SAME = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens")


def result(folder: Path) -> tuple[object, bytes]:
    """What must be the same: the curve without its clocks, and the weights."""
    lines = [json.loads(x) for x in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    curve = [{key: line[key] for key in SAME if key in line} for line in lines]
    return curve, (folder / "out" / "adapter_model.safetensors").read_bytes()


def test_killed_runs_end_as_one_that_nobody_killed(
    train: Callable[..., Outcome],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    draw = random.Random(SEED)
    whole = tmp_path / "whole"
    whole.mkdir()
    done = train(whole, **KEYS)
    assert done.code == 0, done.err
    kills = runs = 0
    fallen = list[str]()
    while kills < KILLS:
        folder = tmp_path / str(runs)
        folder.mkdir()
        runs += 1
        moments = list[float]()
        for _ in range(draw.randint(1, 3)):
            moments.append(draw.uniform(0.2, done.seconds))
            outcome = train(folder, **KEYS, options={"seconds": moments[-1]})
            kills += not outcome.ended
            if outcome.ended and outcome.code:
                break
        last = train(folder, **KEYS, options={"seconds": 120})
        if last.code or result(folder) != result(whole):
            fallen.append(f"killed at {moments}: exit code {last.code}, {last.err[-300:]}")
    record_property("attack", ["runs killed", runs, runs - len(fallen)])
    assert not fallen, "\n".join(fallen)

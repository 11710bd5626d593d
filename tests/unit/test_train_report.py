"""Test that a run prints each plan and each warning once."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from attnimg.cli.train import PrintedReport
from attnimg.config.schema import make_warning
from attnimg.pipeline import select
from attnimg.task import read_task
from attnimg.train.run import with_model_config

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run

AGAIN = "selects again"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_run.make_model(folder / "model")
    return folder


@pytest.mark.parametrize(("first", "plans"), [("sdpa", 1), ("eager", 2)])
def test_a_plan_is_printed_again_if_the_choice_changed(tiny: Path, first: str, plans: int) -> None:
    out = io.StringIO()
    config = tiny_run.config_for(tiny, overrides_of_model_config={"rms_norm_eps": 0.5},
                                 attn_implementation="sdpa")  # fmt: skip
    task, _ = read_task(config, tiny_run.CPU)
    report = PrintedReport(Console(file=out, width=200))
    plan = select(replace(task, requested=first), report)
    unread = replace(task, problem=replace(task.problem, model=None))  # as of the hub
    _, chosen = with_model_config(config, unread, plan, report)
    assert chosen.chosen is not None
    assert chosen.chosen.backend.name == "sdpa"
    assert out.getvalue().count("because") == plans
    assert (AGAIN in out.getvalue()) is (plans == 2)


def test_a_warning_is_printed_once() -> None:
    out = io.StringIO()
    report = PrintedReport(Console(file=out, width=200))
    one, two = (make_warning("a-code", "key", text, "do") for text in ("the first", "the second"))
    report.warn([one])
    report.warn([one, two])
    assert out.getvalue().count("the first") == 1
    assert out.getvalue().count("the second") == 1

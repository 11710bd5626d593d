"""Train a few model types of docs/measured/families.json and compare with the record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from families import RECORD, run

from attnimg import pipeline
from attnimg.selection import model_types

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

FOUND = json.loads(RECORD.read_text())["types"]


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Skip the kernels' proofs, and restore the environment after a run."""
    monkeypatch.setattr(pipeline, "verify_plan", lambda plan, task, report: (plan, ()))
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", ["afmoe", "opt", "deepseek_v32", "bert", "gemma4_assistant"])
def test_a_type_comes_out_as_recorded(tmp_path: Path, name: str) -> None:
    for found, results in run([name], home=tmp_path):
        assert results == FOUND[found]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("opt", {"trains": "sdpa_math"}, id="goes on to what isolates"),
        pytest.param("bloom", {"refused": "packing-not-isolated"}, id="or stops"),
    ],
)
def test_a_leak_that_no_table_knows_is_found_on_the_model_itself(
    tmp_path: Path, name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_types, "refused_types", dict)
    ((_, results),) = run([name], home=tmp_path)
    assert expected.items() <= results["packed"].items()

"""Check that the record of `make test/axolotl` is up to date: the same plugin, example and lock."""

from __future__ import annotations

import json

import pytest
from axolotl_record import RECORD, described

FOUND = json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_record_is_up_to_date() -> None:
    now = described()
    assert {name: FOUND[name] for name in now} == now, "run make test/axolotl"


def test_every_run_has_the_losses_of_eager_attention() -> None:
    runs = dict(FOUND["runs"])
    plain = runs.pop("without the plugin, eager")
    assert {run["backend"] for run in runs.values()} == {"sdpa", "flash_attention_2"}
    for run in runs.values():
        assert run["losses"] == pytest.approx(plain["losses"], rel=1e-3)

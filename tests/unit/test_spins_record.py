"""Test that the record of benchmarks/spins.py is up to date, and what it must show."""

from __future__ import annotations

import json

from attnimg.machine.threads import SPINS_BUSY, SPINS_IDLE
from benchmarks import spins

RECORD = json.loads(spins.RECORD.read_text(encoding="utf-8"))
SPEEDS = RECORD["tokens_per_second"]
# What the medians of such a measurement differ by.
NOISE = 0.1


def test_the_record_is_up_to_date() -> None:
    settings = spins.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert all(list(runs) == [str(count) for count in spins.SPINS] for runs in SPEEDS.values())


def test_the_page_has_its_figures() -> None:
    page = spins.ROOT / "docs/cpu-limits.md"
    assert spins.table(RECORD) in page.read_text(encoding="utf-8")


def test_the_wait_on_an_idle_machine_costs_little_and_serves_when_neighbours_come() -> None:
    alone, shared = SPEEDS["alone"], SPEEDS["two busy neighbours"]
    library, idle, busy = str(spins.LIBRARY), str(SPINS_IDLE), str(SPINS_BUSY)
    assert alone[idle] > alone[library] * (1 - NOISE)
    assert shared[idle] > shared[library] * (1 + NOISE)
    assert shared[busy] > shared[library] * (1 + NOISE)

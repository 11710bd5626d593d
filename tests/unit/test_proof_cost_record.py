"""Test that the record of benchmarks/proof_cost.py is up to date, and within its bound."""

from __future__ import annotations

import json

from benchmarks import proof_cost

RECORD = json.loads(proof_cost.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_up_to_date() -> None:
    settings = proof_cost.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert set(RECORD["runs"]) == set(proof_cost.RUNS)


def test_a_proof_takes_at_most_half_as_long_again_as_before() -> None:
    for run, found in RECORD["runs"].items():
        again = proof_cost.summary(before=found["before_cpu_s"], after=found["after_cpu_s"])
        assert found == again
        assert found["ratio"] <= proof_cost.MAX_RATIO, run

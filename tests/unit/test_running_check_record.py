"""Test that the record of benchmarks/running_check.py is up to date, and within its bounds."""

from __future__ import annotations

import json

from benchmarks import running_check

RECORD = json.loads(running_check.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_up_to_date() -> None:
    settings = running_check.settings()
    assert {name: RECORD[name] for name in settings} == settings


def test_no_right_kernel_was_stopped() -> None:
    right = RECORD["right"]
    assert right["checks"] >= 10_000
    assert right["stopped"] == 0, right["reasons"]
    assert right["skipped"] == {}


def test_every_fault_was_found() -> None:
    for fault, counts in RECORD["wrong"].items():
        assert counts["seen"] == counts["checks"], fault
        assert counts["stopped"] >= 0.8 * counts["checks"], fault


def test_a_check_costs_less_than_half_a_percent_at_the_default_interval() -> None:
    for model, cost in RECORD["cost"].items():
        assert 0 < cost["percent_at_200_steps"] < 0.5, model

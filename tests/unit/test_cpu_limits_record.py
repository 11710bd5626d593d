"""Test that the record of benchmarks/cpu_limits.py is up to date, and what it must show."""

from __future__ import annotations

import json

from attnimg.verification.runner import TIMEOUT_S
from benchmarks import cpu_limits

RECORD = json.loads(cpu_limits.RECORD.read_text(encoding="utf-8"))
PAGE = cpu_limits.ROOT / "docs/cpu-limits.md"


def test_the_record_is_up_to_date() -> None:
    settings = cpu_limits.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert list(RECORD["cases"]) == list(cpu_limits.CASES)


def test_the_page_has_its_figures() -> None:
    assert cpu_limits.table(RECORD) in PAGE.read_text(encoding="utf-8")


def test_no_limit_of_cpus_spends_the_time_of_a_proof() -> None:
    for case, sides in RECORD["cases"].items():
        assert sides["new"]["proof_s"] is not None, case
        assert sides["new"]["proof_s"] < TIMEOUT_S["cpu"] / 2, case


def test_no_limit_or_neighbour_makes_it_slower_than_before() -> None:
    for case, sides in RECORD["cases"].items():
        old, new = (sides[side]["tokens_per_second"] for side in ("old", "new"))
        # With a CPU for each thread, they wait as before on an idle machine alone.
        if case not in ("no limit", "--cpus 2") or sides["new"]["load"] <= cpu_limits.IDLE:
            assert new >= old * (1 - cpu_limits.NOISE), case

"""Check that the record of benchmarks/own_loss.py is up to date, and has no errors."""

from __future__ import annotations

import json

from benchmarks import own_loss

RECORD = json.loads(own_loss.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_this_code_and_these_types() -> None:
    settings = own_loss.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert list(RECORD["compared"]) == [*own_loss.TYPES, *own_loss.MISSED_BY_TRL]
    assert len(set(own_loss.TYPES)) == 40


def test_the_summary_is_of_what_was_compared() -> None:
    found = own_loss.summary(RECORD["compared"])
    assert {name: RECORD[name] for name in found} == found


def test_no_right_head_is_said_to_differ_and_no_wrong_one_is_missed() -> None:
    right, wrong, missed = RECORD["right"], RECORD["wrong"], RECORD["missed_by_trl"]
    assert right["comparisons"] == 40 * len(own_loss.PRECISIONS) * len(own_loss.WEIGHTS)
    assert wrong["comparisons"] == 40 * len(own_loss.PRECISIONS) * len(RECORD["wrong_heads"])
    assert right["false_alarms"] == wrong["missed"] == missed["missed"] == []


def test_the_page_quotes_the_record() -> None:
    page = " ".join((own_loss.ROOT / "docs/loss.md").read_text(encoding="utf-8").split())
    right, wrong = RECORD["right"], RECORD["wrong"]
    largest = right["largest_difference_in_tolerances"]
    for text in (
        f"{len(right['false_alarms'])} false alarms in {right['comparisons']} comparisons",
        f"{largest['on_data']} of the tolerance on the data",
        f"{largest['output_layer']} in the output layer",
        f"{len(wrong['missed'])} of {wrong['comparisons']} wrong heads were missed",
        f"took {right['mean_seconds']:.2f} s",
    ):
        assert text in page

"""Test that the record of benchmarks/peers.py and its table are up to date."""

from __future__ import annotations

import copy
import json

from benchmarks import peers

RECORD = json.loads(peers.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_up_to_date() -> None:
    settings = peers.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert set(RECORD["runs"]) == set(peers.TRAINERS)
    for name, runs in RECORD["runs"].items():
        assert len(runs) == RECORD["rounds"] >= 1
        assert RECORD["trainers"][name] == peers.summary(runs)


def test_the_page_has_the_table_of_the_record() -> None:
    text = peers.PAGE.read_text(encoding="utf-8")
    assert peers.page(text, RECORD) == text
    assert peers.page(text, RECORD | {"date": "2000-01-01"}) != text


def test_the_record_names_no_folder_of_its_machine() -> None:
    text = json.dumps(RECORD)
    assert "/tmp" not in text
    assert str(peers.ROOT) not in text


def test_a_missed_target_is_named() -> None:
    good = copy.deepcopy(RECORD)
    for found in good["trainers"].values():
        found |= {"first_step_cpu_s": 10.0, "tokens_per_cpu_s": 100.0, "final_loss": 1.0}
    good["trainers"]["attnimg"] |= {"first_step_cpu_s": 5.0}
    assert peers.misses(good) == []
    for change, goal in (
        ({"first_step_cpu_s": 5.1}, "first step"),
        ({"tokens_per_cpu_s": 99.0}, "throughput"),
        ({"final_loss": 1.2}, "final loss"),
    ):
        bad = copy.deepcopy(good)
        bad["trainers"]["attnimg"] |= change
        assert [text.partition(":")[0] for text in peers.misses(bad)] == [goal]

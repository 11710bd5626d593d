"""Check that the record of benchmarks/checkpoints.py is up to date, and within the target."""

from __future__ import annotations

import json

import pytest

from benchmarks import checkpoints

RECORD = json.loads(checkpoints.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_this_code() -> None:
    described = checkpoints.described()
    assert {name: RECORD[name] for name in described} == described
    found = checkpoints.summary(RECORD)
    assert {name: RECORD[name] for name in found} == found
    for kind in checkpoints.KINDS:
        assert len(RECORD["saves"][kind]) == checkpoints.ORDER.count(kind)
    assert len(RECORD["resumes"]) == checkpoints.RESUMES


@pytest.mark.xfail(strict=True, reason="SHA-256 needs 0.25 s of CPU time, a plain save 0.24 s")
def test_hashing_adds_at_most_the_target_to_a_save() -> None:
    assert RECORD["extra_of_hashing"] <= checkpoints.TARGET


def test_the_check_is_within_the_target_of_resuming() -> None:
    assert RECORD["share_of_resume"] <= checkpoints.TARGET


def test_the_page_quotes_the_record() -> None:
    page = " ".join((checkpoints.ROOT / "docs/resume.md").read_text(encoding="utf-8").split())
    for text in (
        f"{RECORD['checkpoint_mb']} MB",
        f"{RECORD['seconds_of_save_hashed']} s",
        f"{RECORD['seconds_of_save_plain']} s without hashes",
        f"({RECORD['extra_of_hashing']:.1%} more)",
        f"{RECORD['seconds_of_save_earlier']} s as attnimg 0.1.0",
        f"{RECORD['seconds_of_check']} s of {RECORD['seconds_of_resume']} s",
        f"{RECORD['share_of_resume']:.1%}",
    ):
        assert text in page, text

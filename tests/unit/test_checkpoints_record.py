"""Check that the record of benchmarks/checkpoints.py is up to date, and within the target."""

from __future__ import annotations

import json

import pytest

from benchmarks import checkpoints

RECORD = json.loads(checkpoints.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_this_code() -> None:
    settings = checkpoints.settings()
    assert {name: RECORD[name] for name in settings} == settings
    assert RECORD["medians"] == checkpoints.medians(RECORD)
    for name in checkpoints.RUNS:
        for kind in checkpoints.KINDS:
            saves = RECORD["saves"][name][kind]
            assert len(saves) == checkpoints.save_order(name).count(kind)
            assert all(save["blocked"] <= save["cycle"] for save in saves)
        assert len(RECORD["resumes"][name]) == checkpoints.RESUMES


@pytest.mark.parametrize("share", checkpoints.SHARES)
@pytest.mark.parametrize("name", checkpoints.RUNS)
def test_hashing_is_within_the_target(name: str, share: str) -> None:
    assert RECORD["medians"][name][share] <= checkpoints.TARGET


def test_the_page_quotes_the_record() -> None:
    page = (checkpoints.ROOT / "docs/resume.md").read_text(encoding="utf-8")
    for name, run in checkpoints.RUNS.items():
        found = RECORD["medians"][name]
        seconds = {
            what: [f"{found[kind][what]:.2f} s" for kind in checkpoints.KINDS]
            for what in ("blocked", "finished", "cycle")
        }
        size = f"{RECORD['saves'][name]['mb']} MB"
        saves = [size, str(run["cores"]), *seconds["blocked"], f"{found['more_blocked']:+.0%}",
                 *seconds["finished"][:2], *seconds["cycle"][:2],
                 f"{found['more_cpu']:+.2f} s"]  # fmt: skip
        resume = [size, str(run["cores"]), f"{found['resume']:.1f} s", f"{found['check']:.2f} s",
                  f"{found['check_of_resume']:.1%}"]  # fmt: skip
        for cells in (saves, resume):
            assert f"| {' | '.join(cells)} |" in page

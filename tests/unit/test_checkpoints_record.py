"""Check that the record of benchmarks/checkpoints.py is up to date, and within the target."""

from __future__ import annotations

import json

from benchmarks import checkpoints

RECORD = json.loads(checkpoints.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_this_code() -> None:
    settings = checkpoints.settings()
    assert {name: RECORD[name] for name in settings} == settings
    found = checkpoints.summary(RECORD)
    assert {name: RECORD[name] for name in found} == found
    for name in checkpoints.RUNS:
        for kind in checkpoints.KINDS:
            saves = RECORD["saves"][name][kind]
            assert len(saves) == checkpoints.save_order(name).count(kind)
            assert all(save["blocked"] <= save["cycle"] for save in saves)
    assert len(RECORD["resumes"]) == checkpoints.RESUMES


def test_hashing_adds_at_most_the_target_to_a_save() -> None:
    assert RECORD["of_saves"][checkpoints.FIRST]["extra"] <= checkpoints.TARGET


def test_the_check_is_within_the_target_of_resuming() -> None:
    assert RECORD["share_of_resume"] <= checkpoints.TARGET


def test_the_page_quotes_the_record() -> None:
    page = " ".join((checkpoints.ROOT / "docs/resume.md").read_text(encoding="utf-8").split())
    texts = [f"{RECORD['seconds_of_check']} s of {RECORD['seconds_of_resume']} s",
             f"({RECORD['share_of_resume']:.1%})"]  # fmt: skip
    for name, run in checkpoints.RUNS.items():
        found = RECORD["of_saves"][name]
        blocked, finished = (
            [f"{found[kind][what]:.2f} s" for kind in checkpoints.KINDS]
            for what in ("blocked", "finished")
        )
        cells = [f"{RECORD['saves'][name]['mb']} MB", str(run["cores"]),
                 *blocked, f"{found['extra']:+.0%}", *finished[:2]]  # fmt: skip
        texts.append(f"| {' | '.join(cells)} |")
    for text in texts:
        assert text in page, text

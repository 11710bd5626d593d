"""The committed record of benchmarks/proof_noise.py is of these kernels, and without errors."""

from __future__ import annotations

import json

from benchmarks import proof_noise

RECORD = json.loads(proof_noise.RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_these_kernels_and_this_grid() -> None:
    settings = proof_noise.settings()
    assert {name: RECORD[name] for name in settings} == settings


def test_the_record_has_no_wrong_judgement() -> None:
    for counts in RECORD["right"].values():
        assert counts["proofs"] > 0
        assert counts["refused"] == 0, counts["reasons"]
    for part in ("noisy_and_wrong", "wrong"):
        assert RECORD.get(part, {}).get("missed", []) == []
    assert RECORD.get("right_without_noise", {}).get("refused", 0) == 0

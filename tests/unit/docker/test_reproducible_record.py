"""The record of `make test/reproducible`: what two builds without a cache had in common."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[3]
LAYERS = json.loads((ROOT / "docs/measured/reproducible.json").read_text(encoding="utf-8"))[
    "layers"
]


def test_nothing_differed_but_times() -> None:
    assert {text for layer in LAYERS for text in layer["how"]} <= {"time"}


def test_the_large_layers_were_equal_bit_for_bit() -> None:
    large = [layer for layer in LAYERS if layer["files"] > 400]
    assert len(large) >= 4, "the base, torch, the stack, attnimg"
    assert all(layer["same_digest"] for layer in large)

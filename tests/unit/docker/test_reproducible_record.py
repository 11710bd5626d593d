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


# No command inside a layer sets their times: the whiteout of the base's folder, and the folders
# that COPY creates.
DIFFERING = {"var/log/.wh.apt", "opt", "opt/attnimg"}


def test_all_but_three_entries_were_equal_bit_for_bit() -> None:
    assert len(LAYERS) >= 10
    assert all(layer["differs"] == len(layer["paths"]) for layer in LAYERS)
    assert {path for layer in LAYERS for path in layer["paths"]} <= DIFFERING
    assert all(layer["same_digest"] for layer in LAYERS if not layer["paths"])

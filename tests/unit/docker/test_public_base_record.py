"""The record of `make test/public-base`: of this base, and all gates and tests passed on it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from recipes.gates import gate_names

ROOT = Path(__file__).parents[3]
RECORD = json.loads((ROOT / "docs/measured/public-base.json").read_text(encoding="utf-8"))


def test_the_record_is_of_the_base_as_it_is_made_now() -> None:
    names = ("Dockerfile", "requirements.txt")
    texts = [(ROOT / "tests/public_base" / name).read_bytes() for name in names]
    assert RECORD["inputs"] == hashlib.sha256(b"\n".join(texts)).hexdigest(), RECORD["command"]


def test_the_image_on_the_public_base_passed() -> None:
    assert RECORD["labels_name_the_base"]
    assert RECORD["python"].endswith("/usr/local")
    assert set(RECORD["gates"]) <= gate_names()
    assert {"symbols", "pins", "sbom", "layers", "duplicates"} <= set(RECORD["gates"])
    for name, gate in RECORD["gates"].items():
        assert (name, gate["findings"], gate["skipped"]) == (name, 0, "")
    assert RECORD["tests"]["passed"] > 0
    assert not {"failed", "error"} & set(RECORD["tests"])

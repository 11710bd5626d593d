"""The record of `make test/children`: of these examples, and all of them were built and ran."""

from __future__ import annotations

import json

from child_images_record import EXAMPLES, RECORD, ROOT, inputs, table

FOUND = json.loads(RECORD.read_text(encoding="utf-8"))


def test_the_record_is_of_the_examples_as_they_are_now() -> None:
    assert FOUND["inputs"] == inputs(), "make test/children"


def test_every_example_was_built() -> None:
    examples = {path.name for path in EXAMPLES.iterdir() if (path / "Dockerfile").exists()}
    assert set(FOUND["children"]) == examples
    assert all(child["build_seconds"] > 0 for child in FOUND["children"].values())


def test_the_page_has_its_figures() -> None:
    assert table(FOUND) in (ROOT / "docs/extend-an-image.md").read_text(encoding="utf-8")

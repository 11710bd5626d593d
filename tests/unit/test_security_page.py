"""Test that each line of SECURITY.md names a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| (?!what \||---)(.+?) \|.*\| `([\w/.]+)::(\w+)` \|$")


def test_each_line_names_a_test_that_exists() -> None:
    page = (ROOT / "SECURITY.md").read_text().splitlines()
    rows = [line for line in page if line.startswith("| ") and not line.startswith("| what |")]
    assert len(rows) > 15
    for line in rows:
        match = ROW.match(line)
        assert match, f"this line names no test: {line}"
        source = (ROOT / match[2]).read_text()
        assert f"def {match[3]}(" in source, f"{match[2]} has no {match[3]}"

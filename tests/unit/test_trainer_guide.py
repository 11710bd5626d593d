"""The code of docs/use-your-own-trainer.md is that of the examples, which the tests run."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "use-your-own-trainer.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
SCRIPTS = [path.read_text(encoding="utf-8") for path in (ROOT / "examples/trainer").glob("*.py")]


def is_part_of(code, script):
    """Return whether lines are consecutive lines of a script, at any indentation."""
    lines, wanted = script.splitlines(keepends=True), code.count("\n")
    parts = (lines[start : start + wanted] for start in range(len(lines) - wanted + 1))
    return any(dedent("".join(part)) == code for part in parts)


@pytest.mark.parametrize("code", CODE)
def test_code_of_the_guide_is_code_of_an_example(code):
    assert any(is_part_of(code, script) for script in SCRIPTS)


def test_there_is_code_and_a_changed_line_is_noticed():
    assert len(CODE) == 3
    assert not any(is_part_of(CODE[1].replace("packing=True", ""), script) for script in SCRIPTS)


def test_the_guide_is_short():
    words = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL).split()
    assert 300 <= len(words) <= 500

"""The README is short, and it and the guides show what `attnimg explain` really prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The keys of examples/demo/make_model.py that attention depends on.
DEMO_MODEL = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "hidden_size": 256, "max_position_embeddings": 1024,
}  # fmt: skip


def long_lines(text: str) -> list[str]:
    """Return the lines of over 120 characters that are no rows of tables."""
    return [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


def differing_lines(shown: str, printed: str) -> list[str]:
    """Return the shown lines that were not printed in their place; a last "..." cuts the rest."""
    lines = shown.strip("\n").splitlines()
    rest = [line.rstrip() for line in printed.strip("\n").splitlines()]
    if lines[-1] == "...":
        lines.pop()
        rest = rest[: len(lines)]
    if len(lines) != len(rest):
        return [f"{len(lines)} lines are shown, {len(rest)} were printed"]
    return [line for line, found in zip(lines, rest, strict=True) if line != found]


def test_it_has_under_900_words_and_no_long_line() -> None:
    assert len(README.split()) < 900
    assert long_lines(README) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [("x" * 120, 0), ("x" * 121, 1), ("| " + "x" * 121, 0)],
    ids=["120 characters", "121", "a row of a table"],
)
def test_a_long_line_is_found(text: str, found: int) -> None:
    assert len(long_lines(f"a\n{text}\nb")) == found


def test_the_demo_s_model_is_the_one_that_is_explained() -> None:
    script = (ROOT / "examples/demo/make_model.py").read_text(encoding="utf-8")
    for key, value in DEMO_MODEL.items():
        assert f"{key}={value}," in script


@pytest.mark.parametrize("page", ["README.md", "docs/why-this-backend.md"])
def test_explain_prints_what_a_page_shows(tmp_path: Path, page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    shown = re.search(r"```\n\$ \.venv/bin/attnimg (explain .*)\n([^`]*)```", text)
    assert shown
    folder = tmp_path / "outputs/demo/untrained"
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **DEMO_MODEL}
    (folder / "config.json").write_text(json.dumps(config))
    example = tmp_path / "examples/demo"
    example.mkdir(parents=True)
    (example / "demo.yaml").write_text((ROOT / "examples/demo/demo.yaml").read_text())
    done = subprocess.run(
        [sys.executable, "-m", "attnimg", *shown[1].split()],
        cwd=tmp_path, env={**os.environ, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert differing_lines(shown[2], done.stdout + done.stderr) == []


@pytest.mark.parametrize(
    ("shown", "differ"),
    [
        pytest.param("a\nb\nc\n", [], id="all of it"),
        pytest.param("a\nb\n...\n", [], id="its beginning"),
        pytest.param("a\nx\n...\n", ["x"], id="another line"),
        pytest.param("a\nb\n", ["2 lines are shown, 3 were printed"], id="cut without a mark"),
    ],
)
def test_other_output_is_found(shown: str, differ: list[str]) -> None:
    assert differing_lines(shown, "a\nb  \nc\n") == differ

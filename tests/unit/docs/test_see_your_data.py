"""docs/see-your-data.md shows what `attnimg preprocess` prints for the demo."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.cli.samples_html import write_page
from attnimg.cli.samples_text import print_figures, print_samples, printer
from attnimg.config.schema import Config
from attnimg.train.preprocess import Preprocessed, prepare_data
from attnimg.train.samples import choose_row, choose_samples
from examples.demo import prepare

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/see-your-data.md"
EXAMPLE = ROOT / "docs/demo-data.html"
BLOCK = re.compile(
    r"```\n\$ attnimg preprocess examples/demo/demo.yaml --show 1\n(?P<shown>[^`]*)```"
)
# Documents of the packed row that the page shows; a line of dots stands for the others.
DOCUMENTS = 2


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preprocessed:
    """Prepare the data of the demo, in a folder as `make demo` leaves it."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load((ROOT / "examples/demo/demo.yaml").read_text(encoding="utf-8"))
    data = Path(config["datasets"][0]["path"])
    data.parent.mkdir(parents=True)
    chats = [
        {"messages": [{"role": "user", "content": record["instruction"]},
                      {"role": "assistant", "content": record["output"]}]}
        for record in prepare.chosen_definitions()
    ]  # fmt: skip
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    return prepare_data(Config(**config), prepare.make_tokenizer())


def printed(prepared: Preprocessed) -> str:
    """Return what the command prints, up to a few documents of the row."""
    out = printer(io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    print_figures(prepared, out)
    print_samples(
        choose_samples(prepared, 1, seed=0, limit=400), choose_row(prepared, seed=0, limit=80), out
    )
    file: Any = out.console.file
    file.flush()
    text = file.buffer.getvalue().decode()
    return text[: text.index(f"\n─── document {DOCUMENTS + 1},")].rstrip("\n") + "\n...\n"


def test_the_page_shows_what_is_printed(prepared: Preprocessed) -> None:
    text = PAGE.read_text(encoding="utf-8")
    block = BLOCK.search(text)
    assert block
    found = printed(prepared)
    if os.environ.get("UPDATE_PAGES"):
        start, end = block.span("shown")
        PAGE.write_text(text[:start] + found + text[end:], encoding="utf-8")
        pytest.skip("the page was updated; run it again without UPDATE_PAGES")
    assert block["shown"] == found, "UPDATE_PAGES=1 writes what is printed"


def test_the_example_is_the_page_that_is_written(prepared: Preprocessed, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_page(
        page,
        prepared,
        name="demo.yaml",
        samples=choose_samples(prepared, 5, seed=0, limit=4000),
        row=choose_row(prepared, seed=0, limit=4000),
        seed=0,
    )
    if os.environ.get("UPDATE_PAGES"):
        EXAMPLE.write_bytes(page.read_bytes())
        pytest.skip("the example was updated; run it again without UPDATE_PAGES")
    assert EXAMPLE.read_bytes() == page.read_bytes(), "UPDATE_PAGES=1 writes what is written"

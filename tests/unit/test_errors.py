"""Test that errors are printed with escaped control characters, and shortened."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path

import pytest
from rich.markup import escape

from attnimg.__main__ import run
from attnimg.cli import as_text, json_line
from attnimg.errors import AttnimgError, counted, printable, shortened


def test_one_thing_is_in_the_singular() -> None:
    assert [counted(count, "row") for count in (0, 1, 2, 1234)] == [
        "0 rows", "1 row", "2 rows", "1,234 rows",
    ]  # fmt: skip
    assert (counted(1, "batch", "batches"), counted(2, "batch", "batches")) == (
        "1 batch", "2 batches",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("foreign", "shown"),
    [
        (
            "plain, \u00e4\u00f6\u00fc, \u6f22\u5b57, \U0001f600",
            "plain, \u00e4\u00f6\u00fc, \u6f22\u5b57, \U0001f600",
        ),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2Jcleared", r"\x1b[2Jcleared"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten", r"over\rwritten"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("\x00\x7f", r"\x00\x7f"),
    ],
)
def test_what_a_terminal_acts_on_is_shown_as_an_escape(foreign: str, shown: str) -> None:
    assert printable(foreign) == shown
    error = str(AttnimgError(foreign, why=foreign, do=foreign))
    assert error.count(shown.splitlines()[0]) == 3
    stream = io.StringIO()
    as_text.console(stream).print(foreign, markup=False, highlight=False, soft_wrap=True)
    assert printable(stream.getvalue()) == stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_styles_are_kept_on_a_terminal() -> None:
    screen = as_text.PrintableConsole(
        file=io.StringIO(), force_terminal=True, color_system="standard"
    )
    foreign = "[bold]a\x1b[2J"
    screen.print(f"[red]{escape(foreign)}[/]", highlight=False)
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    assert printed == "\x1b[31m[bold]a\\x1b[2J\x1b[0m\n"


def test_a_long_part_is_cut_and_says_by_how_much() -> None:
    error = str(AttnimgError("what", why="x" * 100_000, do="do"))
    assert len(error) < 5000
    assert "(96,000 more characters)" in error
    assert shortened("x" * 4000) == "x" * 4000


def test_a_warning_that_python_raises_is_a_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "base_model: m\nlearning_rate: 1e-4\ndatasets: [{path: x}]\nflash_attention: true\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(["check", str(file)]) == 2
    said = capsys.readouterr().err
    assert "write attn_implementation: flash_attention_2" in said
    assert "do:  follow the warning" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(["check", str(file)]) == 0


def test_json_has_no_character_that_a_terminal_acts_on() -> None:
    value = {"text": "\x1b[31m\x7f\x8b\x9f\u202e\u2066 é"}
    text = json_line(value)
    assert json.loads(text) == value
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\u2066]", text)
    assert "é" in text


URI = "https://bob:pw12@host/x"


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", URI), ("chat", URI), ("evaluate", URI), ("explain", URI), ("check", URI),
        ("explain", "--json", URI), ("check", "--json", URI), ("convert", URI), ("merge", "x", URI),
        ("train", "FILE", "hf_AbCdEfGhIjKlMnOpQrSt=1"), ("train", "FILE", URI),
        ("explain", "FILE", "hf_AbCdEfGhIjKlMnOpQrSt=1"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_secrets_in_arguments_are_not_printed(
    arguments: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("base_model: m\nlearning_rate: 1e-4\ndatasets: [{path: x, type: completion}]\n")
    run([str(file) if argument == "FILE" else argument for argument in arguments])
    said = capsys.readouterr()
    text = said.out + said.err
    assert "pw12" not in text
    assert "hf_AbC" not in text
    assert "***" in text


def test_what_is_no_secret_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a@b:c@d" / "https:" / "host" / "x@y.yaml"
    run(["check", "--json", str(path)])
    assert json.loads(capsys.readouterr().out)["file"] == str(path)
    error = AttnimgError("no https://host/a@b", why="found hf_use_auth_token", do="see C:/a@b")
    assert "no https://host/a@b" in str(error)
    assert "hf_use_auth_token" in str(error)
    assert "C:/a@b" in str(error)

"""YAML that is not a config gets the contract's code, and the place where there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attnimg.config import check_file
from attnimg.config.read import parse_yaml, with_overrides
from attnimg.errors import AttnimgError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{letter}: &{letter} [{', '.join(['*' + chr(ord(letter) - 1)] * 10)}]\n"
    for letter in "bcdefghij"
)


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        pytest.param(b"", "empty", "", id="nothing"),
        pytest.param(b"# only a comment\n", "empty", "", id="a comment"),
        pytest.param(b"---\n", "empty", "", id="an empty document"),
        pytest.param(b"null\n", "empty", "", id="null"),
        pytest.param(b"- a\n- b\n", "not-a-mapping", "list", id="a list"),
        pytest.param(b"hello\n", "not-a-mapping", "str", id="a word"),
        pytest.param(b"a: 1\nb: 2\na: 3\n", "duplicate-key", "line 3, column 1", id="a key twice"),
        pytest.param(
            b"a:\n  b: 1\n  b: 2\n", "duplicate-key", "line 3, column 3", id="a nested key twice"
        ),
        pytest.param(b"a: [1, 2\nb: 3\n", "yaml-syntax", "line 2", id="an open bracket"),
        pytest.param(b"a:\n\tb: 1\n", "yaml-syntax", "line 2, column 1", id="a tab"),
        pytest.param(b"a: 1\n b: 2\n", "yaml-syntax", "line 2", id="a wrong indent"),
        pytest.param(b"a: !!python/object:os.system x\n", "yaml-syntax", "line 1", id="a tag"),
        pytest.param(b"a: 1\n---\nb: 2\n", "yaml-syntax", "line 2", id="two documents"),
        pytest.param(b"a: *nothing\n", "yaml-syntax", "line 1", id="an unknown alias"),
        pytest.param(b"a: &a [*a]\n", "yaml-syntax", "line 1", id="an anchor that holds itself"),
        pytest.param(b"? [a]\n: 1\n", "yaml-syntax", "line 1", id="a list as a key"),
        pytest.param(b"a: !!bool maybe\n", "yaml-syntax", "line 1, column 4", id="a bad bool tag"),
        pytest.param(b'a: !!int ""\n', "yaml-syntax", "line 1", id="a bad int tag"),
        pytest.param(b"a: !!binary gIGC\n", "yaml-syntax", "line 1", id="binary"),
        pytest.param(b"a: 0x" + b"f" * 5000, "yaml-syntax", "20000 bits", id="a huge number"),
        pytest.param(b"a: {yes: 1, true: 2}\n", "duplicate-key", "line 1", id="one key, two words"),
        pytest.param(
            b"x: &x {p: 1}\nb:\n  <<: *x\n  <<: *x\n", "duplicate-key", "line 4", id="two merges"
        ),
        pytest.param(b"[" * 100_000, "yaml-syntax", "", id="nested too deeply"),
        pytest.param(b"\x00\x01\x02\xff", "not-text", "", id="bytes"),
        pytest.param(b"a: \xff\xfe\n", "not-text", "", id="no UTF-8"),
        pytest.param(b"a: 1\x00\n", "not-text", "NUL", id="a NUL"),
        pytest.param(b"a: \x07bell\n", "not-text", "", id="a control character"),
        pytest.param(b"a: " + b"x" * 1_000_000, "too-large", "", id="over 1 MB"),
        pytest.param(BOMB.encode(), "too-large", "alias", id="an anchor bomb"),
    ],
)
def test_what_is_no_config_has_a_code(tmp_path: Path, raw: bytes, code: str, says: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(raw)
    checked = check_file(str(file))
    assert checked.config is None
    (error,) = checked.errors
    assert error.code == code
    assert says in f"{error.what} {error.why}"
    assert error.why
    assert error.do


@pytest.mark.parametrize("name", ["missing.yaml", ".", "missing/x.yaml"])
def test_a_file_that_cannot_be_read_is_missing(tmp_path: Path, name: str) -> None:
    (error,) = check_file(str(tmp_path / name)).errors
    assert error.code == "file-missing"


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (error,) = check_file(str(tmp_path / "pipe")).errors
    assert error.code == "file-missing"


def test_a_key_may_override_a_merged_one_of_an_anchor_that_is_merged_again() -> None:
    text = "a: &a\n  <<: {seed: 1}\n  seed: 2\n<<: *a\nb: 3\n"
    assert parse_yaml(text, name="x") == {"a": {"seed": 2}, "seed": 2, "b": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E+3", 2000.0),
        ("-1.5e-3", -1.5e-3),
        (".5", 0.5),
        ("3", 3),
        ("1_000", 1000),
        ("yes", True),
        ("Off", False),
        ("on", True),
        ("no", False),
        ("~", None),
        ("2026-11-21", "2026-11-21"),
        ("'1e-4'", "1e-4"),
        ("e4", "e4"),
        ("1e", "1e"),
    ],
)
def test_scalars_are_read_as_people_mean_them(text: str, value: object) -> None:
    read = parse_yaml(f"a: {text}\n", name="x")["a"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merges_work() -> None:
    text = "base: &base {a: 1, b: 2}\nmore:\n  <<: *base\n  b: 3\n"
    assert parse_yaml(text, name="x")["more"] == {"a": 1, "b": 3}


def test_settings_nest_and_leave_the_rest() -> None:
    values = {"a": 1, "datasets": [{"path": "x"}], "deep": {"er": {"k": 1, "l": 2}}}
    settings = ("learning_rate=1e-4", "datasets.0.path=y", "deep.er.k=no", "new.key=[1, 2]", "a=")
    assert with_overrides(values, settings) == {
        "a": None,
        "datasets": [{"path": "y"}],
        "deep": {"er": {"k": False, "l": 2}},
        "new": {"key": [1, 2]},
        "learning_rate": 1e-4,
    }
    assert values == {"a": 1, "datasets": [{"path": "x"}], "deep": {"er": {"k": 1, "l": 2}}}


@pytest.mark.parametrize("setting", ["learning_rate", "=3", "a.b=1", "datasets.5.path=x", "k=[1"])
def test_a_setting_that_does_not_fit_is_refused(setting: str) -> None:
    with pytest.raises(AttnimgError):
        with_overrides({"a": 1, "datasets": [{"path": "x"}]}, (setting,))

"""`python -m recipes` shows faults with the user's files as errors, its own as tracebacks."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from recipes import __main__ as command


def run(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(command, "render", fail)
    monkeypatch.setattr(sys, "argv", ["recipes", "render"])
    command.main()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_file_that_the_user_can_t_write_is_named(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "engine.lock"
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, OSError(number, os.strerror(number), str(path)))
    assert caught.value.code == 1
    what, why, do = capsys.readouterr().err.splitlines()
    assert what == "recipes: render can't use a file"
    assert os.strerror(number) in why
    assert str(path) in why
    assert "owner" in do


def test_another_fault_is_shown_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        run(monkeypatch, FileNotFoundError(errno.ENOENT, "gone", "/gone"))

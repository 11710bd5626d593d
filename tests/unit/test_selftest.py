"""`attnimg selftest --only` runs the tests that it names, and refuses what names none."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnimg.cli import doctor
from attnimg.errors import AttnimgError


@pytest.fixture(autouse=True)
def tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of an image: two files, of which one fails."""
    (tmp_path / "test_packages.py").write_text("def test_it_imports():\n    pass\n")
    (tmp_path / "test_training.py").write_text("def test_it_trains():\n    assert False\n")
    monkeypatch.setattr(doctor, "_TESTS", tmp_path)
    monkeypatch.setattr(doctor, "use_shipped_kernels", lambda machine: None)


@pytest.mark.parametrize(
    ("only", "code"),
    [("packages", 0), ("imports and not trains", 0), ("training", 1), (None, 1), ("", 1), (" ", 1)],
)
def test_the_named_tests_run(only: str | None, code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        doctor.selftest(only)
    assert caught.value.code == code


@pytest.mark.parametrize("only", ["nope", "--collect-only -q", "-x", "packages training", "("])
def test_words_that_name_no_test_are_refused_with_the_files_of_tests(only: str) -> None:
    with pytest.raises(AttnimgError) as caught:
        doctor.selftest(only)
    error = caught.value
    assert (error.code, error.exit_code) == ("no-tests", 2)
    assert repr(only) in error.why
    assert "packages, training" in error.why
    assert "--only packages" in error.do

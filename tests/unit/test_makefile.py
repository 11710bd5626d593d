"""The Makefile passes its variables on, and refuses wrong ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = "/no/such place/it's $(here)"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder in the place of .venv/bin, whose python prints its arguments, one per line."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "variable", "option"),
    [
        ("sources/hopper", "FROM", "--from"),
        ("gate/cpu", "ARCHIVE", "--archive"),
        ("gate/cpu", "WHEELS", "--wheels"),
        ("gpu-kit", "COMPILE", "--compile"),
    ],
)
def test_a_path_may_have_blanks(programs: Path, target: str, variable: str, option: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    # make expands $ in variables.
    given = f"{variable}={PLACE.replace('$', '$$')}"
    done = subprocess.run(
        ["make", "-o", ".venv/ready", f"BIN={programs}", target, given],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[arguments.index(option) + 1] == PLACE


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "variable"),
    [("verify/cpu", "TAG"), ("verify/cpu", "DIGEST"), ("test/cpu", "DIGEST")],
)
def test_the_name_of_an_image_is_not_run_by_the_shell(
    programs: Path, target: str, variable: str
) -> None:
    (programs / "pytest").write_text('#!/bin/sh\nprintf "%s\\n" "$IMAGE"\n')
    (programs / "pytest").chmod(0o755)
    name = "$(echo run)`echo run`\"'$HOME"
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    done = subprocess.run(
        ["make", "-o", ".venv/ready", f"BIN={programs}", target,
         f"{variable}={name.replace('$', '$$')}"],
        cwd=ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == name


@pytest.mark.parametrize("target", ["fa4-kernels/turing", "triton-kernels/turing"])
def test_an_image_without_kernels_to_compile_ahead_is_refused(programs: Path, target: str) -> None:
    done = subprocess.run(
        ["make", "-o", ".venv/ready", f"BIN={programs}", target],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    what, why, do, _ = done.stderr.splitlines()
    assert "attnimg:turing has no " in what
    assert "docker/images/turing/" in why
    assert "hopper" in do

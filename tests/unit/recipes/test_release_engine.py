"""The second engine removes its own folders as root, and never another one that a file names."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.release.clean_engine import clean_engine, left_over


@pytest.fixture
def engine_folder(tmp_path: Path) -> Path:
    """The folder of an engine; its neighbour engine.at names the short one."""
    (tmp_path / "release").mkdir()
    return tmp_path / "release/engine"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder as an engine that was killed leaves it, in a temporary folder of the test's own."""
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    found = Path(tempfile.mkdtemp(prefix="attnimg-engine-"))
    (found / "log").write_text("x")
    return found


def test_the_folder_that_a_killed_engine_left_is_found(engine_folder: Path, short: Path) -> None:
    at = engine_folder.with_name("engine.at")
    assert left_over(at) is None
    at.write_text(str(short))
    assert left_over(at) == short
    shutil.rmtree(short)
    assert left_over(at) is None


def home(short: Path) -> Path:
    """A folder of somebody's work."""
    work = short.parent.parent / "work"
    work.mkdir()
    (work / "thesis").write_text("years")
    return work


def link(short: Path) -> Path:
    found = short.with_name("attnimg-engine-link")
    found.symlink_to(home(short))
    return found


def elsewhere(short: Path) -> Path:
    found = home(short) / "attnimg-engine-1"
    found.mkdir()
    return found


def a_file(short: Path) -> Path:
    found = short.with_name("attnimg-engine-file")
    found.write_text("x")
    return found


WRONG: dict[str, Callable[[Path], object]] = {
    "a folder of work": home,
    "a link to it": link,
    "one of that name elsewhere": elsewhere,
    "a file": a_file,
    "inside it": lambda short: short / "log",
    "the temporary folder": lambda short: short.parent,
    "a way round": lambda short: f"{short}/../../work",
    "a slash at the end": lambda short: f"{short}/",
    "a second slash": lambda short: f"/{short}",
    "a new line": lambda short: f"{short}\n",
    "nothing": lambda _: "",
    "no path": lambda _: "a\0b",
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_no_other_folder_is_removed_whatever_the_file_says(
    engine_folder: Path, short: Path, wrong: Callable[[Path], object]
) -> None:
    at = engine_folder.with_name("engine.at")
    at.write_text(str(wrong(short)))
    assert left_over(at) is None


def test_a_file_that_is_a_folder_or_no_text_names_nothing(engine_folder: Path, short: Path) -> None:
    at = engine_folder.with_name("engine.at")
    at.write_bytes(b"\xff\xfe")
    assert left_over(at) is None
    at.unlink()
    at.mkdir()
    assert left_over(at) is None


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_left(engine_folder: Path, short: Path) -> None:
    at = engine_folder.with_name("engine.at")
    at.write_text(str(short))
    os.chown(short, 12345, 12345)
    assert left_over(at) is None


@pytest.mark.skipif(os.getuid() != 0, reason="an engine needs root")
def test_starting_an_engine_removes_what_was_left_and_follows_no_link(
    engine_folder: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dockerd here ends at once: what is removed before and after it is the same."""
    work = home(short)
    programs = short.parent.parent / "programs"
    programs.mkdir()
    (programs / "dockerd").write_text("#!/bin/sh\necho no engine today\nexit 1\n")
    (programs / "dockerd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    at, pid = (engine_folder.with_name(f"engine.{end}") for end in ("at", "pid"))

    def start() -> None:
        with clean_engine(engine_folder, size=0) as host:
            assert host == ""
            assert engine_folder.is_dir()
            assert not engine_folder.is_symlink()
        assert not os.path.lexists(engine_folder)
        assert not os.path.lexists(at)
        assert (work / "thesis").read_text() == "years"

    at.write_text(str(short))
    pid.write_text(str(os.getpid()))  # a number that another process has since
    start()
    assert not short.exists()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(work)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:  # where this container may not mount, the link alone is tested
        (work / "thesis").write_text("years")
        engine_folder.symlink_to(work)
        start()
        assert os.path.ismount(work) == mounted
    finally:
        subprocess.run(["umount", "--lazy", str(work)], capture_output=True, check=False)
    engine_folder.symlink_to(work)
    at.write_text(str(work))
    pid.write_text("../../etc")
    start()
    at.symlink_to(work / "thesis")
    start()

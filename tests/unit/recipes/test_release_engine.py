"""The second engine removes its own folders as root, and never another one that a file names."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.release.clean_engine import bridge_of, clean_engine, engine_settings, left_over


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
        assert not Path("/sys/class/net", bridge_of(engine_folder)).exists()
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


@pytest.mark.parametrize("program", ["dockerd", "ip"])
def test_without_a_program_there_is_no_engine_and_the_reason_is_shown(
    program: str, engine_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name in {"dockerd", "ip"} - {program}:
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("recipes.release.clean_engine._SYSTEM_PROGRAMS", str(tmp_path))
    with clean_engine(engine_folder, size=0) as host:
        assert host == ""
    assert f"no second engine: {program} is not installed" in capsys.readouterr().err
    assert not engine_folder.exists()


def test_two_folders_have_two_bridges_whose_names_linux_takes(tmp_path: Path) -> None:
    names = {bridge_of(tmp_path / "one/engine"), bridge_of(tmp_path / "two/engine")}
    assert len(names) == 2
    assert {len(name.encode()) for name in names} == {15}


NO_SETTINGS = {"features": {"containerd-snapshotter": False}}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"data-root": "/data", "bip": "10.0.0.1/24", "default-runtime": "nvidia"}', {}),
        ('{"insecure-registries": ["a:5000"], "hosts": []}', {"insecure-registries": ["a:5000"]}),
        ('{"proxies": {"https-proxy": "http://p:1"}}', {"proxies": {"https-proxy": "http://p:1"}}),
        ('{"features": {"containerd-snapshotter": true}}', {}),
        ("[]", {}),
        ("{", {}),
        ("[" * 100_000, {}),
        ("", {}),
    ],
    ids=["its own", "a registry without TLS", "a proxy", "the image store", "a list",
         "no JSON", "deep", "empty"],
)  # fmt: skip
def test_of_the_machines_settings_those_about_registries_are_kept(
    text: str, kept: dict[str, object], tmp_path: Path
) -> None:
    config = tmp_path / "daemon.json"
    assert engine_settings(config) == NO_SETTINGS
    config.write_text(text)
    assert engine_settings(config) == {**kept, **NO_SETTINGS}

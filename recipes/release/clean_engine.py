"""Start a second Docker engine that has no image, layer or cache of this machine's own engine.

It needs root, or sudo without a password, and dockerd. Containers have no network in it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from recipes.release.programs import report

_START_SECONDS = 60
# Unpacked bytes for each compressed byte: while it pulls cpu, 0.32 GB, an engine uses 1.5 GB
# (2026-11-27). This is about twice that.
_UNPACKED = 10
# Bytes of memory that stay free for other processes.
_KEPT_FREE = 2 << 30
_PREFIX = "attnimg-engine-"


@contextmanager
def clean_engine(folder: Path, *, size: int) -> Iterator[str]:
    """Run an engine in a folder; yield its DOCKER_HOST, or "" where none can be started.

    Args:
        folder: for its images, removed before and after.
        size: of the compressed image in bytes: where memory has room, the folder is there.
    """
    sudo = _sudo()
    if shutil.which("dockerd") is None or sudo is None:
        yield ""
        return
    pid_file = folder.with_name(f"{folder.name}.pid")
    at = folder.with_name(f"{folder.name}.at")
    _stop_left_over(pid_file, folder, sudo)
    _remove(folder, sudo)
    if (short_left := left_over(at)) is not None:
        _remove(short_left, sudo)
    _remove(at, sudo)
    folder.mkdir(parents=True)
    _mount_in_memory(folder, size * _UNPACKED, sudo)
    # A socket's path has at most 108 characters, so it can't be in the folder.
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as short:
        host = f"unix://{short}/docker.sock"
        at.write_text(short, encoding="utf-8")
        # dockerd ends when this process ends, also if it is killed.
        command = [*sudo, "setpriv", "--pdeathsig=TERM", "dockerd", f"--host={host}"]
        command += [f"--data-root={folder.resolve()}", f"--exec-root={short}/exec"]
        command += [f"--pidfile={pid_file.resolve()}", f"--group={os.getgid()}"]
        command += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
        log = Path(short, "log")
        with log.open("w") as out:
            engine = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            if _answers(host, engine):
                yield host
            else:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
                report(f"  no second engine: {lines[-1] if lines else 'dockerd did not start'}")
                yield ""
        finally:
            _stop(engine, sudo)
            _remove(Path(short, "exec"), sudo)
            _remove(folder, sudo)
            at.unlink(missing_ok=True)


def left_over(at: Path) -> Path | None:
    """Return the folder of an engine that was killed; None if there is none of ours.

    It is removed as root, so no other folder is returned, whatever the file says.

    Args:
        at: the file with its path.
    """
    try:
        text = at.read_text(encoding="utf-8")
        found = Path(text).lstat()
    except (OSError, ValueError):  # it is not there, not text, or not a path
        return None
    # A path with ".." or a second slash at its beginning is not in this form.
    if not re.fullmatch(re.escape(f"{tempfile.gettempdir()}/{_PREFIX}") + r"[a-z0-9_]+", text):
        why = f"not a folder {_PREFIX}... of {tempfile.gettempdir()}"
    elif not stat.S_ISDIR(found.st_mode):
        why = "not a folder"
    elif found.st_uid not in (0, os.getuid()):
        why = "of another user"
    else:
        return Path(text)
    report(f"  not removed: {text!r}, named by {at}, is {why}")
    return None


def _sudo() -> list[str] | None:
    """Return what runs a program as root: nothing, sudo, or None if neither does."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    asks = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode
    return None if asks else ["sudo", "-n"]


def _answers(host: str, engine: subprocess.Popen[bytes]) -> bool:
    """Wait until the engine answers; return whether it does."""
    end = time.monotonic() + _START_SECONDS
    while time.monotonic() < end and engine.poll() is None:
        done = subprocess.run(
            ["docker", "info"], env={**os.environ, "DOCKER_HOST": host}, capture_output=True,
            check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return True
        time.sleep(0.3)
    return False


def _stop_left_over(pid_file: Path, folder: Path, sudo: list[str]) -> None:
    """Stop the engine of a release that was killed, if it still runs on this folder."""
    option = f"--data-root={folder.resolve()}"
    end = time.monotonic() + _START_SECONDS
    try:
        pid = int(pid_file.read_text(encoding="utf-8"))
        while option in psutil.Process(pid).cmdline() and time.monotonic() < end:
            subprocess.run([*sudo, "kill", str(pid)], capture_output=True, check=False)
            time.sleep(0.3)
    # The file or the process is not there, or the file holds no number of a process.
    except (OSError, ValueError, OverflowError, psutil.Error):
        return


def _stop(engine: subprocess.Popen[bytes], sudo: list[str]) -> None:
    if engine.poll() is None:
        subprocess.run([*sudo, "kill", f"-{signal.SIGTERM.value}", str(engine.pid)], check=False)
        try:
            engine.wait(timeout=30)
        except subprocess.TimeoutExpired:
            subprocess.run([*sudo, "kill", "-9", str(engine.pid)], check=False)
            engine.wait()


def _mount_in_memory(folder: Path, needed: int, sudo: list[str]) -> None:
    """Mount a tmpfs on a folder if memory has room; a busy disk takes minutes for 30,000 files."""
    if psutil.virtual_memory().available > needed + _KEPT_FREE:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={needed}", "tmpfs", str(folder)]
        subprocess.run([*sudo, *mount], capture_output=True, check=False)


def _remove(folder: Path, sudo: list[str]) -> None:
    # os.path.ismount, unlike Path.is_mount, is false for a symbolic link, which umount follows.
    if os.path.ismount(folder):
        subprocess.run([*sudo, "umount", "--lazy", str(folder)], check=False)
    if os.path.lexists(folder):
        subprocess.run([*sudo, "rm", "-rf", "--one-file-system", str(folder)], check=False)

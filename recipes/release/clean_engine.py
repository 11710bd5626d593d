"""Start a second Docker engine that has no image, layer or cache of this machine's own engine.

It needs root, or sudo without a password, and dockerd. Containers have no network in it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recipes.release.programs import report

_START_SECONDS = 60


@contextmanager
def clean_engine(folder: Path) -> Iterator[str]:
    """Run an engine in a folder; yield its DOCKER_HOST, or "" where none can be started.

    Args:
        folder: for its images, removed before and after; it needs the space of the image.
    """
    sudo = _sudo()
    if shutil.which("dockerd") is None or sudo is None:
        yield ""
        return
    _remove(folder, sudo)
    folder.mkdir(parents=True)
    # A socket's path has at most 108 characters, so it can't be in the folder.
    with tempfile.TemporaryDirectory(prefix="attnimg-engine-") as short:
        host = f"unix://{short}/docker.sock"
        command = [*sudo, "dockerd", f"--host={host}", f"--data-root={folder.resolve()}"]
        command += [f"--exec-root={short}/exec", f"--pidfile={short}/pid", f"--group={os.getgid()}"]
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


def _stop(engine: subprocess.Popen[bytes], sudo: list[str]) -> None:
    if engine.poll() is None:
        subprocess.run([*sudo, "kill", f"-{signal.SIGTERM.value}", str(engine.pid)], check=False)
        try:
            engine.wait(timeout=30)
        except subprocess.TimeoutExpired:
            subprocess.run([*sudo, "kill", "-9", str(engine.pid)], check=False)
            engine.wait()


def _remove(folder: Path, sudo: list[str]) -> None:
    if folder.exists():
        subprocess.run([*sudo, "rm", "-rf", "--one-file-system", str(folder)], check=False)

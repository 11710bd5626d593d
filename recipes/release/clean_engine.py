"""Start a second Docker engine that has no image, layer or cache of this machine's own engine.

It needs root, or sudo without a password, dockerd and ip. Its containers have no network, but it
has a bridge of its own: without one (--bridge=none) dockerd removes docker0, the bridge of the
engine that is running, whose containers then have no network.
Source: moby 26.1, daemon/daemon_unix.go, removeDefaultBridgeInterface (2026-11-28).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
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
from typing import Any

import psutil

from recipes.release.programs import report

_START_SECONDS = 60
# Unpacked bytes for each compressed byte: while it pulls cpu, 0.32 GB, an engine uses 1.5 GB
# (2026-11-27). This is about twice that.
_UNPACKED = 10
# Bytes of memory that stay free for other processes.
_KEPT_FREE = 2 << 30
_PREFIX = "attnimg-engine-"
# The folders of dockerd and ip, which are not on the PATH of a user of Debian.
_SYSTEM_PROGRAMS = "/usr/local/sbin:/usr/sbin:/sbin"
# For documentation only, so that no registry is there (RFC 5737). If the bridge has no address,
# dockerd gives it one of 65,536 that may be in use elsewhere.
_ADDRESS = "203.0.113.253/30"
# Keep the bridge for as long as the engine runs. Both end with this process, also if it is killed
# and sudo is in between: then the shell's standard input ends. $! is the engine, the last process.
_WITH_BRIDGE = """
ip=$1 bridge=$2 address=$3; shift 3
"$ip" link add "$bridge" type bridge || exit
exec 3<&0
{ cat <&3 >/dev/null; kill $$; } & reader=$!
trap 'trap "" TERM; kill $! $reader 2>/dev/null; wait $!; "$ip" link delete "$bridge"' EXIT
trap exit TERM
"$ip" address add "$address" dev "$bridge" || exit
"$@" </dev/null 3<&- &
wait $!
"""
_CONFIG = Path("/etc/docker/daemon.json")
# What this machine's engine needs to reach a registry; other settings are about its own images,
# networks and containers, and some can't be set twice, by a file and by an option.
_KEPT_SETTINGS = ("insecure-registries", "proxies", "registry-mirrors")


@contextmanager
def clean_engine(folder: Path, *, size: int) -> Iterator[str]:
    """Run an engine in a folder; yield its DOCKER_HOST, or "" where none can be started.

    Args:
        folder: for its images, removed before and after.
        size: of the compressed image in bytes: where memory has room, the folder is there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        # The engine does not inherit it: it ends with this process.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"  waiting for the second engine of another process in {folder.parent}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if fault := _fault():
            report(f"  no second engine: {fault}")
            yield ""
            return
        with _running(folder, size=size, sudo=_sudo() or []) as host:
            yield host


@contextmanager
def _running(folder: Path, *, size: int, sudo: list[str]) -> Iterator[str]:
    pid_file = folder.with_name(f"{folder.name}.pid")
    at = folder.with_name(f"{folder.name}.at")
    bridge = bridge_of(folder)
    _stop_left_over(pid_file, folder, sudo)
    _remove_bridge(bridge, sudo)
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
        config = Path(short, "daemon.json")
        config.write_text(json.dumps(engine_settings(_CONFIG)), encoding="utf-8")
        command = [*sudo, "sh", "-c", _WITH_BRIDGE, "engine"]
        command += [str(_program("ip")), bridge, _ADDRESS]
        command += [str(_program("dockerd")), f"--config-file={config}", f"--host={host}"]
        command += [f"--data-root={folder.resolve()}", f"--exec-root={short}/exec"]
        command += [f"--pidfile={pid_file.resolve()}", f"--group={os.getgid()}"]
        command += [f"--bridge={bridge}", "--iptables=false", "--ip6tables=false"]
        command += ["--ip-forward=false", "--ip-masq=false", f"--containerd-namespace={bridge}"]
        command += [f"--containerd-plugins-namespace={bridge}-plugins"]
        log = Path(short, "log")
        with log.open("w") as out:
            engine = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
            )
        try:
            if _answers(host, engine):
                yield host
            else:
                _stop(engine, sudo)
                report(f"  no second engine: {_last_line(log)}")
                yield ""
        finally:
            _stop(engine, sudo)
            _remove_bridge(bridge, sudo)
            _remove(Path(short, "exec"), sudo)
            _remove(folder, sudo)
            at.unlink(missing_ok=True)


def engine_variables(host: str) -> dict[str, str]:
    """Return the environment variables with which docker talks to an engine.

    DOCKER_TLS_VERIFY, which is for an engine on another machine, would ask it for a certificate.
    """
    return {"DOCKER_HOST": host, "DOCKER_TLS_VERIFY": ""}


def bridge_of(folder: Path) -> str:
    """Return the name of an engine's bridge, 15 characters as Linux allows; each folder has one."""
    return f"attnimg{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"


def engine_settings(config: Path) -> dict[str, Any]:
    """Return the settings of the second engine, with those of this machine's about registries.

    Args:
        config: of this machine's engine; it may not be there.
    """
    try:
        own = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # an engine that runs has not read it either
        own = {}
    kept = {key: own[key] for key in _KEPT_SETTINGS if key in own} if isinstance(own, dict) else {}
    # containerd's image store, which Docker 29 uses by default, is outside the folder.
    return {**kept, "features": {"containerd-snapshotter": False}}


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


def _fault() -> str:
    """Return why no second engine can be started; empty if one can."""
    for program, package in (
        ("dockerd", "Docker's engine"),
        ("ip", "iproute2"),
    ):
        if _program(program) is None:
            return f"{program} is not installed (it is in {package})"
    return "it needs root, or sudo without a password" if _sudo() is None else ""


def _program(name: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), _SYSTEM_PROGRAMS])
    return shutil.which(name, path=path)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else "dockerd did not start"


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
            ["docker", "info"], env={**os.environ, **engine_variables(host)}, capture_output=True,
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
            # The whole group: dockerd would go on without the shell.
            subprocess.run([*sudo, "kill", "-9", "--", f"-{engine.pid}"], check=False)
            engine.wait()
    assert engine.stdin is not None
    engine.stdin.close()


def _remove_bridge(name: str, sudo: list[str]) -> None:
    if Path("/sys/class/net", name, "bridge").is_dir():
        subprocess.run([*sudo, str(_program("ip")), "link", "delete", name], check=False)


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

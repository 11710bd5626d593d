"""The second engine leaves the network of the running engine as it was, also if it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from recipes.release.clean_engine import (
    bridge_of,
    clean_engine,
    engine_variables,
    left_over,
)

NETWORKS = Path("/sys/class/net")
DOCKER0 = NETWORKS / "docker0/ifindex"
# It holds an engine until its input ends.
HOLD = """
import os, sys
from pathlib import Path
if "sudo" in sys.argv:
    os.geteuid = lambda: 1000
from recipes.release.clean_engine import clean_engine
with clean_engine(Path(sys.argv[1]), size=0) as host:
    print(host, flush=True)
    sys.stdin.read()
"""

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="a second engine needs root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("dockerd", "ip"))), reason="there is no dockerd or no ip"
    ),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a second engine."""
    return tmp_path / "engine"


def docker(*arguments: str, host: str = "") -> str:
    env = os.environ | (engine_variables(host) if host else {})
    command = ["docker", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


# As sudo does, it waits for the program and passes SIGTERM on.
SUDO = """#!/bin/sh
shift
exec 3<&0
trap 'kill $program' TERM
"$@" <&3 3<&- & program=$!
wait $program; wait $program
"""


def start(folder: Path, *, sudo: bool = False) -> subprocess.Popen[str]:
    """Start a process that holds an engine, as root or as a user with sudo, which is simulated."""
    env = dict(os.environ)
    if sudo:
        programs = folder.with_name("programs")
        programs.mkdir()
        (programs / "sudo").write_text(SUDO)
        (programs / "sudo").chmod(0o755)
        env["PATH"] = f"{programs}:{env['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *(["sudo"] if sudo else [])], env=env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def engines(folder: Path) -> list[int]:
    """The processes of dockerd that run on a folder."""
    option = f"--data-root={folder.resolve()}"
    return [
        process.pid
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "dockerd" and option in (process.info["cmdline"] or [])
    ]


def wait_until(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not done() and time.monotonic() < end:
        time.sleep(0.1)
    return done()


def test_the_running_engine_keeps_its_bridge_and_its_containers_their_network(
    folder: Path,
) -> None:
    if not DOCKER0.exists():
        pytest.skip("no engine with docker0 is running here")
    before = DOCKER0.read_text()
    with clean_engine(folder, size=0) as host:
        assert host
        assert docker("image", "ls", "--quiet", host=host) == "", "it is not empty"
        assert DOCKER0.read_text() == before
        assert (NETWORKS / bridge_of(folder)).exists()
    assert DOCKER0.read_text() == before
    assert not (NETWORKS / bridge_of(folder)).exists()
    if docker("image", "ls", "--quiet", "attnimg:cpu"):
        run = ["run", "--rm", "--network", "bridge", "--entrypoint", "cat", "attnimg:cpu"]
        assert docker(*run, "/sys/class/net/eth0/operstate") == "up\n"


@pytest.mark.parametrize("sudo", [False, True], ids=["root", "sudo"])
def test_an_engine_whose_process_is_killed_leaves_no_bridge_and_no_engine(
    folder: Path, sudo: bool
) -> None:
    process = start(folder, sudo=sudo)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("unix://")
    assert (NETWORKS / bridge_of(folder)).exists()
    assert engines(folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert wait_until(lambda: not (NETWORKS / bridge_of(folder)).exists())
    assert wait_until(lambda: not engines(folder))
    short = left_over(folder.with_name("engine.at"))
    assert short is not None, "the next engine would not find its folder"
    with clean_engine(folder, size=0) as host:
        assert host
    assert not short.exists()
    assert not os.path.ismount(folder)


def test_the_next_engine_replaces_one_whose_every_process_was_killed(folder: Path) -> None:
    bridge = bridge_of(folder)
    process = start(folder)
    assert process.stdout is not None
    assert process.stdout.readline()
    (engine,) = engines(folder)
    shell = psutil.Process(engine).parent()
    assert shell is not None
    for one in (shell, process):
        one.send_signal(signal.SIGSTOP)  # so that neither removes anything
        one.kill()
    process.communicate()
    assert wait_until(lambda: not shell.is_running())
    assert (NETWORKS / bridge).exists(), "the shell removed it; the test is to be corrected"
    with clean_engine(folder, size=0) as host:
        assert docker("info", "--format", "{{.Driver}}", host=host)
    assert not (NETWORKS / bridge).exists()
    assert not engines(folder)


def test_an_engine_of_a_user_with_sudo_ends_without_a_rest(folder: Path) -> None:
    process = start(folder, sudo=True)
    assert process.stdout is not None
    host = process.stdout.readline().strip()
    assert docker("info", "--format", "{{.Driver}}", host=host)
    process.communicate("")
    assert process.returncode == 0
    assert not (NETWORKS / bridge_of(folder)).exists()
    assert not engines(folder)


def test_a_second_process_in_the_same_folder_waits_for_the_first(folder: Path) -> None:
    first = start(folder)
    assert first.stdout is not None
    host = first.stdout.readline().strip()
    second = start(folder)
    assert second.stderr is not None
    assert "waiting for the second engine of another process" in second.stderr.readline()
    assert docker("info", "--format", "{{.Driver}}", host=host), "the second stopped the first"
    first.communicate("")
    output, _ = second.communicate("")
    assert output.startswith("unix://")
    assert second.returncode == first.returncode == 0
    assert not (NETWORKS / bridge_of(folder)).exists()


def test_settings_of_the_machines_own_engine_do_not_stop_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set twice, by a file and by an option, bip and data-root are refused by dockerd."""
    config = tmp_path / "daemon.json"
    own = {"bip": "10.99.0.1/24", "data-root": "/nowhere", "default-runtime": "nvidia"}
    config.write_text(json.dumps(own | {"insecure-registries": ["registry.example.com:5000"]}))
    monkeypatch.setattr("recipes.release.clean_engine._CONFIG", config)
    # Of a user whose own engine is on another machine, or named by a context.
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CONTEXT", "mine")
    with clean_engine(folder, size=0) as host:
        assert host
        info = json.loads(docker("info", "--format", "{{json .RegistryConfig}}", host=host))
    assert "registry.example.com:5000" in info["IndexConfigs"]

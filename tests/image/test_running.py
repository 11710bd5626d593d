"""What `docker run IMAGE ...` does: commands, programs, users, read-only containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import GID, ROOT, UID, Run, faults, mounted

ANY_USER = ("--user=4321:4399",)
NOTHING_WRITABLE = ("--read-only", "--network=none")


@pytest.mark.parametrize(
    ("options", "arguments", "code", "message"),
    [
        pytest.param((), (), 0, "doctor", id="no argument prints the help"),
        pytest.param((), ("--version",), 0, "attnimg 0", id="an option is attnimg's"),
        pytest.param((), ("python", "-c", "print(6 * 7)"), 0, "42", id="another word is a program"),
        pytest.param((), ("bash", "-c", "exit 7"), 7, "", id="a program's exit code is passed on"),
        pytest.param((), ("trian",), 127, "neither an attnimg command", id="a typo is reported"),
        pytest.param((), ("check", "none.yaml"), 2, "none.yaml", id="bad input exits with 2"),
        pytest.param((), ("id", "-u"), 0, "1000", id="it is not root"),
        pytest.param(
            ANY_USER,
            ("python", "-c", "import getpass; print(getpass.getuser())"),
            0,
            "attnimg",
            id="a user without an entry has a name",
        ),
        pytest.param(
            (*ANY_USER, *NOTHING_WRITABLE),
            ("check", "none.yaml"),
            2,
            "/cache is not writable",
            id="without a writable volume it warns and continues",
        ),
        pytest.param((), ("touch", "/opt/attnimg/x"), 1, "denied", id="its code is not the user's"),
    ],
)
def test_docker_run(
    docker: Run, options: tuple[str, ...], arguments: tuple[str, ...], code: int, message: str
) -> None:
    done = docker(*arguments, options=options)
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param((), "attnimg (1000)", id="as the image's user"),
        pytest.param(
            (*ANY_USER, *NOTHING_WRITABLE, "--tmpfs=/cache:mode=1777"),
            "4321",
            id="as any user in a read-only container with one volume",
        ),
    ],
)
def test_doctor_finds_nothing_wrong(docker: Run, options: tuple[str, ...], message: str) -> None:
    done = docker("doctor", options=options)
    assert faults(done.stdout) == []
    assert message in done.stdout
    assert "Traceback" not in done.stderr


def test_check_accepts_the_demo(docker: Run) -> None:
    options = (f"--volume={ROOT}/examples:/workspace/examples:ro", "--network=none")
    done = docker("check", "examples/demo/demo.yaml", "--json", options=options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_it_trains_the_demo_for_any_user_on_one_volume(docker: Run, workspace: Path) -> None:
    done = docker(
        "train", "examples/demo/demo.yaml", "max_steps=2", "val_set_size=0", "eval_steps=null",
        options=(*mounted(workspace), "--read-only"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = workspace / "outputs" / "demo" / "trained"
    assert (out / "model.safetensors").exists()
    assert {(path.stat().st_uid, path.stat().st_gid) for path in out.rglob("*")} == {(UID, GID)}


def test_its_own_tests_pass(docker: Run) -> None:
    done = docker("selftest", options=("--network=none",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout

"""What `docker run IMAGE ...` does: commands, programs, users, read-only containers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, Run, faults, mounted

from attnimg.selection.gpus_and_images import DIGEST_VARIABLE

ANY_USER = ("--user=4321:4399",)
NOTHING_WRITABLE = ("--read-only", "--network=none")
DIGEST = "sha256:" + "ab" * 32


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


@pytest.mark.parametrize(
    ("option", "threads"),
    [
        ("--cpus=0.5", 1),
        ("--cpus=1", 1),
        ("--cpuset-cpus=0", 1),
        ("--env=OMP_NUM_THREADS=3", 3),
        ("--cpu-shares=1024", os.cpu_count()),
    ],
)
def test_torch_has_as_many_threads_as_the_container_has_cpus(
    docker: Run, option: str, threads: int
) -> None:
    done = docker("doctor", "--json", options=(option,))
    checks = {check["code"]: check for check in json.loads(done.stdout)["checks"]}
    assert f"torch computes with {threads} thread" in checks["cpus"]["what"]


@pytest.mark.parametrize("entrypoint", [(), ("--entrypoint=env",)])
@pytest.mark.parametrize(
    ("options", "threads"),
    [
        (("--cpus=0.5",), 1),
        (("--cpuset-cpus=0",), 1),
        (("--cpus=0.5", "--env=OMP_NUM_THREADS=3"), 3),
        ((), os.cpu_count()),
    ],
)
def test_other_programs_have_as_many_threads(
    docker: Run, options: tuple[str, ...], threads: int, entrypoint: tuple[str, ...]
) -> None:
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    done = docker("python", "-c", code, options=(*options, *entrypoint))
    assert (done.stdout.strip(), done.stderr) == (str(threads), "")


def test_a_worker_has_its_part_of_the_threads_and_a_child_those_of_its_mask(docker: Run) -> None:
    show = "python -c 'import os; print(os.environ[\"OMP_NUM_THREADS\"])'"
    done = docker("bash", "-c", f"LOCAL_WORLD_SIZE=1000 {show}; taskset -c 0 {show}")
    assert (done.stdout.split(), done.stderr) == (["1", "1"], "")


def test_a_proof_is_quick_on_half_a_cpu(docker: Run, workspace: Path) -> None:
    options = [option for option in mounted(workspace) if "OMP_NUM_THREADS" not in option]
    done = docker(
        "train", "examples/demo/demo.yaml", "max_steps=1", "val_set_size=0", "eval_steps=null",
        options=(*options, "--cpus=0.5", f"--env={DIGEST_VARIABLE}={DIGEST}"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    receipt = json.loads((workspace / "outputs/demo/trained/receipt.json").read_text())
    (proof,) = receipt["proofs"]
    assert proof["backend"] == "sdpa"
    assert proof["seconds"] < 30, "6 s on an idle machine (docs/cpu-limits.md)"
    assert receipt["threads"]["OMP_NUM_THREADS"] == "1"
    assert receipt["image"]["digest"] == DIGEST
    manifest = json.loads(docker("cat", "/opt/attnimg/image.json").stdout)
    named = {key: receipt["image"][key] for key in ("name", "version", "revision")}
    assert named == {
        "name": manifest["image"],
        "version": manifest["version"],
        "revision": manifest["revision"],
    }


def test_tools_that_people_expect_are_there(docker: Run) -> None:
    tools = ("git", "curl", "less", "ps")
    done = docker("bash", "-c", " && ".join(f"{tool} --version" for tool in tools))
    assert done.returncode == 0, done.stderr


def test_the_guide_s_commands_work_on_a_fresh_clone(image: str, tmp_path: Path) -> None:
    if image != "attnimg:cpu":
        pytest.skip("the guide's commands are those of attnimg:cpu")
    guide = (ROOT / "docs/build-images.md").read_text(encoding="utf-8")
    lines = re.findall(r"^make run/cpu .*$", guide, re.M)
    assert len(lines) == 3
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    for line in lines:
        # Two steps show as much as the guide's twenty.
        short = line.replace("max_steps=20", "max_steps=2 val_set_size=0 eval_steps=null")
        done = subprocess.run(
            ["bash", "-c", short], cwd=clone, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    owner = clone.stat().st_uid
    trained = clone / "outputs/demo/trained"
    assert (trained / "model.safetensors").exists()
    assert {path.stat().st_uid for path in trained.rglob("*")} == {owner}


def test_check_accepts_the_demo(docker: Run) -> None:
    options = (f"--volume={ROOT}/examples:/workspace/examples:ro", "--network=none")
    done = docker("check", "examples/demo/demo.yaml", "--json", options=options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_its_own_tests_pass(docker: Run) -> None:
    done = docker("selftest", options=("--network=none",))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout

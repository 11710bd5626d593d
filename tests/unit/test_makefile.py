"""The Makefile passes its variables on, and refuses wrong ones."""

from __future__ import annotations

import os
import platform
import re
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


@pytest.mark.parametrize("target", ["wheels/hopper", "kernels/hopper", "whole/hopper"])
def test_an_unknown_kernel_is_refused_before_an_engine_is_started(target: str) -> None:
    done = subprocess.run(
        ["make", "-o", ".venv/ready", target, "KERNEL=$$(echo run)", "CACHE=x", "MACHINE=x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    what, why, do, _ = done.stderr.splitlines()
    assert what == "build: there is no such kernel to build for hopper"
    assert "found KERNEL='$(echo run)'; built for it: flash-attn, flash-attn-3, " in why
    assert do.startswith("  do:  name one of these")


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        pytest.param([], "dist/hopper", id="this machine's"),
        pytest.param(["TRIM=1"], "dist/hopper-trim", id="small builds apart"),
        pytest.param(["PLATFORM=linux/arm64"], "dist/hopper-arm64", id="arm64's apart"),
        pytest.param(["PLATFORM=linux/amd64"], "dist/hopper", id="amd64's"),
    ],
)
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the first is for x86-64")
def test_wheels_have_a_folder_of_their_own(variables: list[str], folder: str) -> None:
    done = subprocess.run(
        ["make", "-n", "-o", "engine", "wheels/hopper", *variables],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"--wheels-to {folder} " in done.stdout + " "


# Each target for an image, with what it needs beside the name.
VARIABLES = {"kernels": ["CACHE=host/name"], "layers": ["CACHE=host/name"], "built": ["MACHINE=x"],
             "whole": ["MACHINE=x"]}  # fmt: skip
FOR_AN_IMAGE = [
    target
    for target in re.findall(r"^([a-z0-9-]+)/%:", (ROOT / "Makefile").read_text(), re.M)
    if target != "matrix"  # of a part of the matrix; IMAGE names the image
]


@pytest.mark.parametrize("target", FOR_AN_IMAGE)
def test_every_target_refuses_an_unknown_image_with_the_known_ones(
    target: str, tmp_path: Path
) -> None:
    """Before it starts an engine, asks a registry or runs a test."""
    (tmp_path / "docker").write_text("#!/bin/sh\necho docker was called >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    for variables in ([], [f"DIGEST=sha256:{'0' * 64}"]):
        done = subprocess.run(
            ["make", "-o", ".venv/ready", "-o", "build/audit/ready", f"{target}/hoper",
             *VARIABLES.get(target, []), *variables],
            cwd=ROOT, env={**env, "PATH": f"{tmp_path}:{env['PATH']}"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "docker was called" not in done.stderr
        what, why, do, _ = done.stderr.splitlines()
        assert re.search(r": there is no image '?hoper'?$", what)
        assert "known: ampere, " in why
        assert "turing" in why
        assert do.startswith("  do:  name one of these")
        if target not in ("test", "gpu", "gate", "verify"):
            break


IN_THE_ENGINE = [["run/cpu"], ["test/cpu"], ["gate/cpu"], ["gpu/cpu"], ["gate/cpu", "CHILD=mine"],
                 ["image-record/cpu"]]  # fmt: skip


@pytest.mark.parametrize("arguments", IN_THE_ENGINE, ids=" ".join)
@pytest.mark.parametrize(
    ("answer", "what", "do"),
    [
        ("Error response from daemon: No such image: x", "there is no image ", " build"),
        ("permission denied while trying to connect to the Docker daemon socket at unix:///x",
         "this user may not use the Docker engine", "usermod"),
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?",
         "no Docker engine is running", "make engine"),
    ],
    ids=["no image", "no permission", "no engine"],
)  # fmt: skip
def test_what_is_not_in_the_engine_is_not_run(
    programs: Path, arguments: list[str], answer: str, what: str, do: str
) -> None:
    """docker run would ask docker.io for it, and pytest would fail in every test."""
    other = '[ "$1 $2" = "image inspect" ] || echo docker "$@" ran >&2'
    (programs / "docker").write_text(f"#!/bin/sh\n{other}\necho '{answer}' >&2\nexit 1\n")
    (programs / "pytest").write_text("#!/bin/sh\necho pytest ran >&2\n")
    for name in ("docker", "pytest"):
        (programs / name).chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    (programs / "python").rename(programs / "python-of-venv")
    done = subprocess.run(
        ["make", "-o", ".venv/ready", f"BIN={programs}", *arguments],
        cwd=ROOT, env={**env, "PATH": f"{programs}:{env['PATH']}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert " ran\n" not in done.stderr
    lines = done.stderr.splitlines()
    assert what in lines[0]
    assert do in lines[2].replace("make build", "docker build")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("target", "variables", "texts"),
    [
        ("wheels/hopper", "KERNEL=xformers", "--wheels-to dist/hopper{files} --kernel"),
        ("wheels/hopper", "TRIM=1", "--wheels-to dist/hopper{files}-trim"),
        ("gate/cpu", "", "build/release/cpu{files}.oci"),
        ("gate/cpu", "", "image=attnimg:cpu{tag};"),
        ("test/cpu", "", 'docker/build.py cpu --built "attnimg:cpu{tag}"'),
        ("built/hopper", "MACHINE=m", "--wheels dist/hopper{files} --machine"),
        ("run/cpu", "", 'docker/build.py cpu --built attnimg:cpu{tag}'),
        ("index/hopper", "", "--to dist/index/hopper{files}"),
    ],
)  # fmt: skip
def test_a_platform_has_names_of_its_own(target: str, variables: str, texts: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    own = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    for cpu in ("", "amd64", "arm64"):
        platform = [f"PLATFORM=linux/{cpu}"] if cpu else []
        done = subprocess.run(
            ["make", "-n", "-o", ".venv/ready", target, *variables.split(), *platform],
            cwd=ROOT, env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        files = "-arm64" if (cpu or own) == "arm64" else ""
        tag = f"-{cpu}" if cpu not in ("", own) else ""
        assert texts.format(files=files, tag=tag) in " ".join(done.stdout.split())

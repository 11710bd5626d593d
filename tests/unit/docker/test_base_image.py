"""The base of a build is what is asked for, by digest, or a stand-in that is named as one."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DIGEST = "sha256:" + "ab" * 32
PUBLIC = "docker.io/library/python:3.11-slim-bookworm"
# A registry with one image, an engine that has only the stand-in.
DOCKER = f"""#!/bin/sh
echo "$@" >>calls
case "$1 $2 $3 $4" in
  "image inspect --format={{{{.Id}}}} "*) echo sha256:5555 ;;
  "image inspect attnimg-base:bookworm "*) echo [] ;;
  "image inspect attnimg-base:bookworm-"*) [ -e has-other ] && echo [] || exit 1 ;;
  "image inspect "*) echo "no such image" >&2; exit 1 ;;
  "pull -q registry.example.com:5000/team/python@{DIGEST} ") ;;
  "pull -q docker.io/library/python@{DIGEST} ") ;;
  *) echo "Error: manifest unknown" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files of docker/, an unresolved base, and the engine above."""
    (tmp_path / "docker").mkdir()
    for name in ("base_image.py", "base.sh", "qemu.sh"):
        (tmp_path / "docker" / name).write_bytes((ROOT / "docker" / name).read_bytes())
        (tmp_path / "docker" / name).chmod(0o755)
    write_bake(tmp_path, PUBLIC)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/docker").write_text(DOCKER)
    (tmp_path / "bin/docker").chmod(0o755)
    return tmp_path


def write_bake(folder: Path, base: str) -> None:
    content = {"variable": {"BASE": {"default": f"docker-image://{base}"}}}
    (folder / "docker/docker-bake.json").write_text(json.dumps(content))


def fetch(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout / 'bin'}:{os.environ['PATH']}"
    inherited = {key: value for key, value in os.environ.items() if key != "BASE_IMAGE"}
    return subprocess.run(
        [sys.executable, "docker/base_image.py"],
        cwd=checkout, env={**inherited, "PATH": path, **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_base_of_the_environment_is_pulled_by_its_digest(checkout: Path) -> None:
    asked = f"registry.example.com:5000/team/python:3.11@{DIGEST}"
    done = fetch(checkout, BASE_IMAGE=asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"base: registry.example.com:5000/team/python:3.11 {DIGEST}\n"


def test_the_base_of_the_recipe_is_pulled_by_its_digest(checkout: Path) -> None:
    write_bake(checkout, f"{PUBLIC}@{DIGEST}")
    assert fetch(checkout).stdout == f"base: {PUBLIC} {DIGEST}\n"
    assert f"pull -q docker.io/library/python@{DIGEST}" in (checkout / "calls").read_text()


@pytest.mark.parametrize(
    ("asked", "what", "why"),
    [
        pytest.param("python:3.11", "BASE_IMAGE has no digest", "found 'python:3.11'", id="a tag"),
        pytest.param("python@sha256:12", "no digest", "64 hexadecimal digits", id="half a digest"),
        pytest.param(
            f"team/other@{DIGEST}", "can't be pulled", "manifest unknown", id="what nobody has"
        ),
    ],
)
def test_a_base_of_the_environment_that_can_not_be_used_is_no_stand_in(
    checkout: Path, asked: str, what: str, why: str
) -> None:
    done = fetch(checkout, BASE_IMAGE=asked)
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert (what in first, why in second, third.startswith("  do:  ")) == (True, True, True)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("base", "why"),
    [
        pytest.param(PUBLIC, "recipes/bases.toml has no digest", id="unresolved"),
        pytest.param(
            PUBLIC.replace("python:", "pythn:") + f"@{DIGEST}", "manifest unknown", id="no registry"
        ),
    ],
)
def test_the_stand_in_is_named_with_the_reason(checkout: Path, base: str, why: str) -> None:
    write_bake(checkout, base)
    done = fetch(checkout)
    assert done.returncode == 0, done.stderr
    assert why in done.stdout
    assert done.stdout.splitlines()[-1] == "base: attnimg-base:bookworm sha256:5555"


@pytest.mark.parametrize("asked", ["", f"team/python@{DIGEST}"])
def test_a_machine_without_docker_is_told_so(checkout: Path, tmp_path: Path, asked: str) -> None:
    (tmp_path / "bin/docker").unlink()
    done = fetch(checkout, PATH=str(tmp_path / "bin"), BASE_IMAGE=asked)
    assert done.returncode == 1
    first, why, do = done.stderr.splitlines()
    assert first == "base: there is no base image without docker"
    assert "found no program docker on PATH" in why
    assert do.startswith("  do:  install Docker")


OTHER = "arm64" if platform.machine() == "x86_64" else "amd64"
ASK = """
import sys; sys.path.insert(0, "docker")
import base_image
base = base_image.for_platform(base_image.BaseImage("", sys.argv[1], "sha256:1"), sys.argv[2])
print(base.name, base.digest)
"""


def for_platform(
    checkout: Path, name: str, target: str, *, runs: bool = True
) -> subprocess.CompletedProcess[str]:
    """Ask for a base of a platform, on a machine without mmdebstrap, with or without emulation."""
    for tool in ("bash", "dirname", "grep", "id"):
        (checkout / "bin" / tool).symlink_to(str(shutil.which(tool)))
    (checkout / "bin/arch-test").write_text(f"#!/bin/sh\nexit {0 if runs else 1}\n")
    (checkout / "bin/arch-test").chmod(0o755)
    return subprocess.run(
        [sys.executable, "-c", ASK, name, target],
        cwd=checkout, env={"PATH": str(checkout / "bin")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "arch", "found"),
    [
        pytest.param(PUBLIC, OTHER, f"{PUBLIC} sha256:1", id="an index has all platforms"),
        pytest.param(
            "attnimg-base:bookworm", OTHER, f"attnimg-base:bookworm-{OTHER} sha256:5555",
            id="another stand-in",
        ),
    ],
)  # fmt: skip
def test_the_base_of_another_platform_is_the_same_index_or_another_stand_in(
    checkout: Path, name: str, arch: str, found: str
) -> None:
    (checkout / "has-other").touch()
    done = for_platform(checkout, name, f"linux/{arch}")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == found


def test_a_stand_in_of_another_platform_needs_the_program_that_makes_it(checkout: Path) -> None:
    done = for_platform(checkout, "attnimg-base:bookworm", f"linux/{OTHER}")
    assert done.returncode == 1
    first, why, do = done.stderr.splitlines()
    assert first == "base: there is no base image"
    assert ("mmdebstrap" in why, do.startswith("  do:  apt-get install mmdebstrap")) == (True, True)


def test_a_base_whose_programs_can_not_run_here_is_refused(checkout: Path) -> None:
    done = for_platform(checkout, PUBLIC, f"linux/{OTHER}", runs=False)
    assert (done.returncode, done.stdout) == (1, "")
    first, why, do = done.stderr.splitlines()
    assert first == f"qemu: this machine can't run programs for {OTHER}"
    assert ("neither arch-test nor docker" in why, "qemu-user-binfmt" in do) == (True, True)


@pytest.mark.parametrize(
    ("runs", "user", "code"),
    [
        pytest.param(True, 1000, 0, id="it can already"),
        pytest.param(False, 1000, 1, id="it can not, and nobody may install"),
    ],
)
def test_only_root_may_let_a_machine_run_another_processor_s_programs(
    checkout: Path, runs: bool, user: int, code: int
) -> None:
    made = {
        "arch-test": f"exit {0 if runs else 1}",
        "id": f"echo {user}",
        "apt-get": "exit 9",
        "grep": "exit 1",
    }
    for name, text in made.items():
        (checkout / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (checkout / "bin" / name).chmod(0o755)
    done = subprocess.run(
        [str(shutil.which("bash")), "docker/qemu.sh", "arm64"],
        cwd=checkout, env={"PATH": str(checkout / "bin")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "")
    lines = done.stderr.splitlines()
    assert [line.lstrip().partition(" ")[0] for line in lines] == (
        ["qemu:", "why:", "do:"] if code else []
    )
    assert not code or "qemu-user-binfmt" in lines[2]

"""Kernels that the registry has are used instead of compiled; what is not sure is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from test_docker_build import build

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docker"))
import kernel_cache  # noqa: E402  # it runs beside docker/build.py, which is no package

BAKE = (ROOT / "docker/docker-bake.json").read_text().replace("${ARCH}", "")
TARGETS = {
    key: target
    for key, target in json.loads(BAKE)["target"].items()
    if key.partition("_")[0] == "hopper"
}
CACHE = "127.0.0.1:5000/team"
# docker, whose registry has the kernels in $HAS; it prints how else it was called.
DOCKER = """#!/bin/sh
[ "$1" = info ] && echo /nowhere && exit
if [ "$2" = imagetools ]; then
  [ -n "$ERROR" ] && echo "ERROR: $ERROR" >&2 && exit 1
  for kernel in $HAS; do case "$5" in *":$kernel-"[0-9a-f][0-9a-f]*) exit 0 ;; esac; done
  echo "ERROR: $5: not found" >&2
  exit 1
fi
echo "$@"
"""


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    program = tmp_path / "docker"
    program.write_text(DOCKER)
    program.chmod(0o755)
    return tmp_path


def settings(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [after for word, after in pairwise(done.stdout.split()) if word == "--set"]


def reference(kernel: str) -> str:
    return kernel_cache.kernel_reference("hopper", kernel, TARGETS, CACHE)


def test_a_kernel_of_the_cache_replaces_its_target_everywhere(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = build("hopper", docker=docker, CACHE=CACHE, HAS="flash-attn-4 flash-attn")
    place = f"docker-image://{reference('flash-attn-4')}"
    assert {text for text in settings(done) if "contexts" in text} == {
        f"hopper_wheels.contexts.flash-attn-4={place}",
        f"hopper_fa4-kernels.contexts.wheel={place}",
        f"hopper_wheels.contexts.flash-attn=docker-image://{reference('flash-attn')}",
    }


def test_each_platform_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also Python's alone, with one key: docker finds no linux/arm64 in an image of linux/amd64."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docker/docker-bake.json").read_text().replace("${ARCH}", "-arm64")
    arm64 = kernel_cache.kernel_reference(
        "hopper", "flash-attn-4", json.loads(text)["target"], CACHE
    )
    assert arm64 == f"{reference('flash-attn-4')}-arm64"


def test_without_a_cache_nothing_is_asked(docker: Path) -> None:
    assert settings(build("hopper", docker=docker, ERROR="asked")) == []


def test_layers_are_read_from_the_image_and_its_torch_and_written_only_where_asked(
    docker: Path,
) -> None:
    place = f"type=registry,ref={CACHE}/attnimg-cache"
    read = [f"hopper.cache-from={place}:hopper", f"hopper.cache-from={place}:2.14.1-cu130"]
    assert settings(build("hopper", docker=docker, CACHE=f"{CACHE}/")) == read
    *found, written = settings(build("hopper", docker=docker, CACHE=CACHE, CACHE_WRITE="1"))
    assert found == read
    assert written.startswith(f"hopper.cache-to={place}:hopper,mode=min,")


def test_the_shared_layers_are_written_under_their_lock(docker: Path) -> None:
    found = settings(build("hopper", "--stage", "stack", "--to-cache", docker=docker, CACHE=CACHE))
    assert found[0] == "hopper_common.target=stack"
    [written] = [text for text in found if ".cache-to=" in text]
    assert f"ref={CACHE}/attnimg-cache:2.14.1-cu130," in written


def test_only_missing_kernels_are_compiled_and_pushed(docker: Path) -> None:
    done = build("hopper", "--to-cache", docker=docker, CACHE=CACHE,
        HAS="flash-attn flash-attn-3 sageattention xformers",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if " bake " in line]
    assert line.endswith(" hopper_flash-attn-4")
    assert f"hopper_flash-attn-4.tags={CACHE}/attnimg-kernels:flash-attn-4-" in line
    assert "hopper_flash-attn-4.output=type=registry" in line
    assert done.stdout.count(" is in the cache") == 4


def test_one_kernel_can_be_asked_for(docker: Path) -> None:
    done = build("hopper", "--to-cache", "--kernel", "xformers", docker=docker, CACHE=CACHE)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if " bake " in line] == [
        "hopper_xformers"
    ]


@pytest.mark.parametrize(
    ("arguments", "variables", "why"),
    [
        pytest.param(
            ["hopper"], {"ERROR": "dial tcp: connection refused"}, "connection refused",
            id="a registry that does not answer",
        ),
        pytest.param(["hopper"], {"ERROR": "401 Unauthorized"}, "401", id="without a login"),
        pytest.param(["hopper"], {"TRIM": "1"}, "found TRIM and CACHE", id="a small build"),
        pytest.param(
            ["hopper", "--to-cache"], {"CACHE": ""}, "no CACHE", id="kernels for no cache"
        ),
        pytest.param(
            ["hopper", "--stage", "stack", "--to-cache"], {"CACHE": ""}, "no CACHE",
            id="layers for no cache",
        ),
        pytest.param(
            ["hopper", "--to-cache", "--kernel", "torchao"], {}, "flash-attn", id="a public wheel"
        ),
        pytest.param(["cpu", "--to-cache"], {}, "none", id="an image without kernels"),
        pytest.param(
            ["turing", "--stage", "unit", "--kernel", "flash-attn"], {"CACHE": ""}, "xformers",
            id="one file of a kernel that the image does not have",
        ),
    ],
)  # fmt: skip
def test_a_cache_that_can_not_be_used_is_refused_instead_of_compiling(
    docker: Path, arguments: list[str], variables: dict[str, str], why: str
) -> None:
    done = build(*arguments, docker=docker, **{"CACHE": CACHE, **variables})
    assert done.returncode == 1
    (reason,) = [line for line in done.stderr.splitlines() if line.startswith("  why:")]
    assert why in reason
    assert "Traceback" not in done.stderr
    assert " bake " not in done.stdout


def test_the_name_changes_with_all_that_compiles_a_kernel_and_with_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("docker", "requirements"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)

    def names() -> dict[str, str]:
        return {
            kernel: kernel_cache.kernel_reference("hopper", kernel, TARGETS, CACHE)
            for kernel in kernel_cache.kernel_names("hopper", TARGETS)
        }

    def append(path: str) -> set[str]:
        """Change a file; return the kernels whose names have changed."""
        before, file = names(), tmp_path / path
        file.write_text(file.read_text() + "# new\n")
        return {kernel for kernel, name in names().items() if name != before[kernel]}

    every = set(names())
    assert every == {"flash-attn", "flash-attn-3", "flash-attn-4", "sageattention", "xformers"}
    # FlashAttention-4 has no machine code: no compiler makes its wheel.
    assert append("requirements/images/toolchain-2.14.1-cu130.txt") == every - {"flash-attn-4"}
    assert append("requirements/images/torch-2.14.1-cu130.txt") == every - {"flash-attn-4"}
    assert append("docker/tools.txt") == {"flash-attn-4"}
    assert append("docker/kernel/build.py") == every
    assert append("requirements/images/toolchain-2.15.0-cu132.txt") == set()
    assert append("docker/Dockerfile") == set()
    file = tmp_path / "docker/images/hopper/kernels/xformers.json"
    before = names()
    file.write_text(file.read_text().replace('"key": "', '"key": "0'))
    assert {kernel for kernel, name in names().items() if name != before[kernel]} == {"xformers"}

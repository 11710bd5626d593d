"""docker/build.py refuses wrong input before it calls Docker."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("name", "why", "do"),
    [
        pytest.param(
            "hoper", "found no target of that name", "recipes/images/hoper.toml", id="typo"
        ),
        pytest.param(
            "rocm", "PyPI has no torch for ROCm", "recipes/images/rocm.toml", id="no torch"
        ),
    ],
)
def test_an_image_that_can_not_be_built_is_refused_in_words(name: str, why: str, do: str) -> None:
    done = subprocess.run(
        [sys.executable, "docker/build.py", name, "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    first, second, third = done.stderr.splitlines()
    assert first.startswith("build: ")
    assert why in second
    assert do in third


def test_an_image_that_can_be_built_is_not_refused() -> None:
    command = [sys.executable, "docker/build.py", "hopper", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def docker(tmp_path: Path) -> Path:
    """A docker that prints how it was called, in a folder for PATH; its disk is not known."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$1" = info ] && echo /nowhere && exit\necho "$@"\n')
    program.chmod(0o755)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/manifest.json").write_text("{}")
    return program.parent


@pytest.mark.parametrize(
    ("arguments", "target", "settings"),
    [
        pytest.param("hopper", "hopper", [], id="an image, with all that it is linked to"),
        pytest.param("hopper-devel", "hopper_devel", [], id="the image with compilers"),
        pytest.param(
            "hopper --stage toolchain",
            "hopper_common",
            ["hopper_common.target=toolchain", "hopper_common.tags=attnimg-toolchain:hopper"],
            id="the toolchain, from a target that is linked to no kernel",
        ),
        pytest.param(
            "hopper --stage fa4-kernels",
            "hopper_fa4-kernels",
            ["hopper_fa4-kernels.tags=attnimg-fa4-kernels:hopper"],
            id="what is compiled ahead of time, from its own target",
        ),
        pytest.param(
            "hopper --kernel flash-attn --stage unit",
            "hopper_flash-attn",
            ["hopper_flash-attn.target=unit", "hopper_flash-attn.tags=attnimg-unit:hopper"],
            id="a stage with the build of one kernel",
        ),
    ],
)
def test_a_stage_is_built_with_the_target_that_has_its_contexts(
    docker: Path, arguments: str, target: str, settings: list[str]
) -> None:
    *command, last = bake(docker, *arguments.split())
    assert last == target
    assert [after for word, after in pairwise(command) if word == "--set"] == settings


def test_wheels_made_earlier_replace_every_kernel_but_what_is_compiled_from_one(
    docker: Path,
) -> None:
    wheels = docker.parent / "wheels"
    command = bake(docker, "hopper", WHEELS=str(wheels))
    replaced = {after for word, after in pairwise(command) if word == "--set"}
    assert replaced == {
        f"hopper.contexts.wheelhouse={wheels}",
        f"hopper_devel.contexts.wheelhouse={wheels}",
        f"hopper_triton-kernels.contexts.wheelhouse={wheels}",
    }


def bake(docker: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the words of the one docker command that builds."""
    path = f"{docker}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "docker/build.py", *arguments],
        cwd=ROOT, env={**os.environ, "PATH": path, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


MOUNTED = sorted(
    set(
        re.findall(
            r"--mount=type=bind,source=([^,\s]+)",
            (ROOT / "docker/Dockerfile").read_text(encoding="utf-8"),
        )
    )
)


@pytest.mark.parametrize("path", MOUNTED)
def test_what_the_dockerfile_mounts_is_there(path: str) -> None:
    assert list(ROOT.glob(re.sub(r"\$[A-Z]+", "*", path))), path


@pytest.mark.parametrize("path", [p for p in MOUNTED if re.fullmatch(r"attnimg/.*[.]py", p)])
def test_a_file_of_attnimg_that_is_mounted_alone_imports_nothing_else_of_it(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imported
    assert not [node for node in imported if "attnimg" in ast.unparse(node)]

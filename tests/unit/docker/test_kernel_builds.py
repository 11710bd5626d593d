"""docker/kernel on a small project: hashes, patches, compilers that die of memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DOCKER = Path(__file__).resolve().parents[3] / "docker"

TOY = Path(__file__).resolve().parents[2] / "fixtures/toy_kernel"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Lay out a project."""
    tree = tmp_path / "tree"
    shutil.copytree(TOY, tree)
    (tree / "stub").mkdir()
    return tree


# As docker/images/IMAGE/kernels/NAME.json.
FACTS: dict[str, Any] = json.loads(TOY.with_suffix(".json").read_text())


def build(
    tree: Path, env: dict[str, str] | None = None, **facts: object
) -> subprocess.CompletedProcess[str]:
    """Build the toy as a stage of the Dockerfile does, its facts those of FACTS but for some."""
    build_file = tree.parent / "toy.json"
    build_file.write_text(json.dumps(FACTS | facts))
    places = {
        "WHEELS": str(tree.parent / "wheels"),
        "PATCHES": str(tree.parent / "patches"),
        "SOURCE": str(tree),
        "TMPDIR": str(tree.parent),
        "PYTHONPATH": str(DOCKER),
    }
    return subprocess.run(
        [sys.executable, "-m", "kernel.build", str(build_file)],
        env={**os.environ, **places, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def report(tree: Path) -> dict[str, object]:
    """Read what the build left beside the wheel."""
    found: dict[str, object] = json.loads((tree.parent / "wheels/toy.json").read_text())
    return found


def patch(tree: Path, text: str, *, name: str = "some.patch") -> None:
    """Write a patch as recipes/patches has them."""
    path = tree.parent / "patches" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"It is needed.\n\n{text}")


ANSWER = "--- a/toy.py\n+++ b/toy.py\n@@ -1 +1 @@\n-answer = 41\n+answer = 42\n"


def test_a_wheel_and_its_report_come_out(tree: Path) -> None:
    done = build(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    found = report(tree)
    assert (found["name"], found["version"], found["key"]) == ("toy", "1", "abcd")
    assert (tree.parent / "wheels" / str(found["wheel"])).stat().st_size == found["bytes"]
    assert (found["attempts"], found["trimmed"]) == (1, False)


def test_a_compiler_that_dies_of_memory_runs_again_with_fewer_beside_it(tree: Path) -> None:
    done = build(tree, {"MOST": "1", "JOBS": "2"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a compiler died of memory; again with 1 jobs" in done.stdout
    assert (report(tree)["attempts"], report(tree)["jobs"]) == (2, 1)
    compiled = (tree / "compiled.txt").read_text()
    assert sorted(compiled) == ["a", "b", "c"], "what was done survived"


def test_one_that_dies_alone_ends_the_build_in_words(tree: Path) -> None:
    done = build(tree, {"MOST": "0", "JOBS": "2"})
    assert done.returncode == 1
    assert "a compiler died of memory, alone" in done.stderr
    assert "do:  give the build more memory" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_source_is_not_tried_again(tree: Path) -> None:
    (tree / "setup.py").write_text("raise SystemExit('no such header')")
    done = build(tree, {"JOBS": "2"})
    assert done.returncode == 1
    assert done.stdout.count("jobs at a time") == 1
    assert "the wheel was not built" in done.stderr


@pytest.mark.parametrize(
    ("job_gb", "jobs"),
    [
        pytest.param(0.001, len(os.sched_getaffinity(0)), id="one a core where memory is ample"),
        pytest.param(100000, 1, id="one where it is scarce"),
    ],
)
def test_jobs_follow_the_memory(tree: Path, job_gb: float, jobs: int) -> None:
    assert build(tree, job_memory_gb=job_gb).returncode == 0
    assert report(tree)["jobs"] == jobs


def test_patches_and_removals_are_made_first(tree: Path) -> None:
    patch(tree, ANSWER)
    done = build(tree, remove=["stub"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tree / "toy.py").read_text() == "answer = 42\n"
    assert not (tree / "stub").exists()


@pytest.mark.parametrize(
    ("text", "remove", "says"),
    [
        pytest.param(
            ANSWER.replace("-answer = 41", "-answer = 40"), [], "can't be applied", id="x"
        ),
        pytest.param("", ["gone"], "there is no gone to remove", id="y"),
    ],
)
def test_a_change_whose_reason_is_gone_ends_the_build(
    tree: Path, text: str, remove: list[str], says: str
) -> None:
    if text:
        patch(tree, text)
    done = build(tree, remove=remove)
    assert done.returncode == 1
    assert says in done.stderr
    assert not (tree.parent / "wheels/toy.json").exists()


def test_a_patch_that_is_applied_already_ends_the_build(tree: Path) -> None:
    patch(tree, ANSWER)
    (tree / "toy.py").write_text("answer = 42\n")
    assert "can't be applied" in build(tree).stderr


def test_a_small_build_says_so_in_its_version_and_has_its_own_patches(tree: Path) -> None:
    patch(tree, ANSWER, name="trim/small.patch")
    small = {"TOY_VERSION": "1+trim"}
    assert build(tree, trim_env=small).returncode == 0
    assert (tree / "toy.py").read_text() == "answer = 41\n"
    shutil.rmtree(tree.parent / "wheels")
    done = build(tree, {"TRIM": "1"}, trim_env=small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (report(tree)["trimmed"], report(tree)["wheel"]) == (True, "toy-1+trim-py3-none-any.whl")
    assert (tree / "toy.py").read_text() == "answer = 42\n"


def test_a_prebuilt_wheel_is_taken_by_its_hash_alone(tree: Path) -> None:
    assert build(tree).returncode == 0
    made = report(tree)
    wheel = (tree.parent / "wheels" / str(made["wheel"])).rename(tree.parent / str(made["wheel"]))
    shutil.rmtree(tree.parent / "wheels")
    done = build(tree, prebuilt=f"toy @ {wheel.as_uri()}", sha256="0" * 64)
    assert done.returncode == 1
    assert "a step of the build failed" in done.stderr
    shutil.rmtree(tree.parent / "kernel")
    done = build(tree, prebuilt=f"toy @ {wheel.as_uri()}", sha256=str(made["sha256"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert report(tree)["sha256"] == made["sha256"]


def test_the_architectures_reach_the_compiler_in_the_variable_that_it_reads(tree: Path) -> None:
    (tree / "setup.py").write_text("import os\nraise SystemExit(os.environ['ARCHS'])")
    done = build(tree, arch_variable="ARCHS", tokens=["10.0", "12.0"], env={"OTHER": "1"})
    assert "10.0;12.0" in done.stdout

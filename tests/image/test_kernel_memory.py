"""A kernel's build under a limit of memory, with the real killer: fewer jobs, and it ends well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from conftest import ROOT, Run

BUILD = ("python", "-B", "-m", "kernel.build", "/toy.json")


def options(folder: Path, **env: str) -> tuple[str, ...]:
    """Mount a copy of the toy, and where its wheel goes."""
    shutil.copytree(ROOT / "tests/fixtures/toy_kernel", folder / "tree")
    build = json.loads((ROOT / "tests/fixtures/toy_kernel.json").read_text())
    (folder / "toy.json").write_text(json.dumps(build | {"job_memory_gb": 0.15}))
    places = {"WHEELS": "/wheels", "SOURCE": "/tree", "PYTHONPATH": "/docker"}
    variables = {**places, "PIP_CONSTRAINT": "", **env}
    return (
        "--network=none",
        "--user=0:0",
        f"--volume={ROOT}/docker/kernel:/docker/kernel:ro",
        f"--volume={folder}/toy.json:/toy.json:ro",
        f"--volume={folder}/tree:/tree",
        f"--volume={folder}/wheels:/wheels",
        *(f"--env={name}={value}" for name, value in variables.items()),
    )


def test_jobs_follow_the_limit_of_a_container(docker: Run) -> None:
    count = "from kernel import jobs; print(jobs.count(2.0))"
    mount = (f"--volume={ROOT}/docker/kernel:/docker/kernel:ro", "--env=PYTHONPATH=/docker")
    done = docker("python", "-B", "-c", count, options=(*mount, "--memory=3g"))
    assert done.stdout.strip() == "1", done.stderr


def test_compilers_that_the_kernel_kills_run_again_alone(docker: Run, tmp_path: Path) -> None:
    limits = ("--memory=450m", "--memory-swap=450m")
    done = docker(*BUILD, options=(*limits, *options(tmp_path, HOG_MB="250", JOBS="2")))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    report = json.loads((tmp_path / "wheels/toy.json").read_text())
    assert report["attempts"] > 1, "two of 250 MB do not fit in 450"
    assert report["jobs"] == 1

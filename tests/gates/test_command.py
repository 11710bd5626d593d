"""`python -m recipes gate`: its report, its JSON, and the SBOM that syft writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from small_image import package, save, wheelhouse

READS = ("recipes", "requirements", "docker/install", "pyproject.toml")


@pytest.fixture
def gate(tmp_path: Path):
    """Run the command on a copy of the recipes: what it writes to dist/ goes there."""
    checkout = tmp_path / "checkout"
    for name in READS:
        source, target = ROOT / name, checkout / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "recipes", "gate", *arguments, "--root", str(checkout)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    return run


def test_a_failed_gate_is_reported_in_three_parts_and_exits_with_1(gate, tmp_path: Path) -> None:
    files = package("numpy", "1.0") | {"root/.netrc": b"machine x"}
    done = gate("cpu", "--archive", str(save(tmp_path / "image.tar", files)))
    assert done.returncode == 1
    assert "  secrets       FAILED: 1 finding\n    root/.netrc\n" in done.stdout
    assert "      why: found a file of credentials in layer 1 (runtime); needed none" in done.stdout
    assert "      do:  revoke it" in done.stdout
    assert "  symbols       skipped: there is no image to look for symbols in" in done.stdout
    assert "gate: reading layer 1 of 1: runtime" in done.stderr


def test_json_has_every_gate_and_the_sbom_is_syft_s_own(gate, tmp_path: Path) -> None:
    image = save(tmp_path / "image.tar", package("numpy", "1.0") | package("stray", "3"))
    done = gate("cpu", "--archive", str(image), "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["passed"]) == (1, False)
    (sbom,) = [verdict for verdict in report["gates"] if verdict["gate"] == "sbom"]
    found = {one["file"]: one["found"] for one in sbom["findings"]}
    assert (found["numpy"], found["stray"], found["torch"]) == ("1.0", "3", "nothing")
    written = json.loads((tmp_path / "checkout/dist/cpu-sbom.json").read_text())
    assert written["bomFormat"] == "CycloneDX"
    assert {"numpy", "stray"} <= {one["name"] for one in written["components"]}
    licences = (tmp_path / "checkout/dist/cpu-licences.txt").read_text()
    assert licences == "numpy 1.0: MIT\nstray 3: MIT\n"


def test_a_wheelhouse_is_judged_without_an_image(gate, tmp_path: Path) -> None:
    wheel = {"stray-1-py3-none-any.whl": package("stray", "1", site="")}
    done = gate("cpu", "--wheels", str(wheelhouse(tmp_path / "wheels", wheel, {})))
    assert done.returncode == 1
    assert "found version 1; needed no package that is not locked" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param([], "found neither --archive, nor --unpacked, nor --wheels", id="nothing"),
        pytest.param(["--archive", "absent.tar"], "found nothing there to read", id="no such file"),
        pytest.param(["--unpacked", "absent"], "found nothing there to read", id="no such folder"),
        pytest.param(["--wheels", "absent"], "found no *.whl in it", id="no such wheelhouse"),
    ],
)
def test_what_can_t_be_read_is_reported_without_a_traceback(
    gate, arguments: list[str], says: str
) -> None:
    done = gate("cpu", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr

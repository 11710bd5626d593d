"""Triton's kernels are compiled without a GPU, and found by a machine that has one.

By docker/precompiled/build.py, on a small kernel: SageAttention is in images alone. TRITON_PYTHON
names an interpreter with Triton and torch; `make test/fa4-cache` has one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from attnimg.facts import Arch, Machine
from attnimg.machine.kernel_cache import triton_settings
from recipes.artifact.elf import read_elf

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
DOCKER = ROOT / "docker"
CODES = {"sm_90": "sm_90a", "sm_120": "sm_120a"}
MODULES = (HERE, DOCKER, ROOT)
# Two numbers of heads; lengths that 16 divides, and others.
KERNELS, CALLS = 4, 2


@dataclass(frozen=True)
class TritonBuild:
    """A set that was compiled here, and how that can be done once more."""

    python: str
    set_file: Path
    state: Path
    out: Path

    def build(self) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "precompiled.build", self.set_file, self.state, self.out)

    def look_up(self, device: str, cache: Path) -> subprocess.CompletedProcess[str]:
        """Ask as a machine with that GPU would, in another process."""
        simulated = HERE / "simulated_gpu.py"
        return self.run(simulated, self.set_file, device, TRITON_CACHE_DIR=str(cache))

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": ":".join(map(str, MODULES)), **variables}
        command = (self.python, "-BWignore", *command)
        return subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, check=False
        )

    @property
    def targets(self) -> dict[str, Any]:
        return json.loads((self.out / "manifest.json").read_text())["targets"]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> TritonBuild:
    if "TRITON_PYTHON" not in os.environ:
        pytest.skip("TRITON_PYTHON names no interpreter; make test/fa4-cache sets it")
    folder = tmp_path_factory.mktemp("triton")
    targets = {device: {"code": code} for device, code in CODES.items()}
    method = {"method": "precompiled.triton.method", "calls": "toy_calls"}
    asked = {**method, "heads": [2, 3], "targets": targets}
    (folder / "set.json").write_text(json.dumps(asked))
    python = str(Path(os.environ["TRITON_PYTHON"]).absolute())
    one = TritonBuild(python, folder / "set.json", folder / "state", folder / "out")
    done = one.build()
    assert done.returncode == 0, done.stderr
    return one


def start(device: str, *, shipped: Path, cache: Path) -> None:
    """Fill the cache as at the start of a run."""
    capability = {"sm_90": (9, 0), "sm_120": (12, 0)}[device]
    arch = Arch(name=device, vendor="nvidia", capability=capability)
    machine = Machine(arch=arch, gpu="NVIDIA GPU", driver="590.10")
    assert triton_settings(machine, {"TRITON_CACHE_DIR": str(cache)}, shipped=shipped) == {}


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in files
    }


def test_each_entry_has_code_for_its_folder_s_gpu_alone(built: TritonBuild) -> None:
    # Read by the gates' reader, which shares nothing with the one that build.py checks with.
    for device, code in CODES.items():
        cubins = sorted((built.out / device).rglob("*.cubin"))
        assert len(cubins) == built.targets[device]["kernels"] == KERNELS
        for path in cubins:
            with path.open("rb") as stream:
                assert read_elf(stream).codes == {code}


def test_a_second_build_compiles_nothing_and_gives_the_same(
    built: TritonBuild, tmp_path: Path
) -> None:
    again = TritonBuild(built.python, built.set_file, built.state, tmp_path / "out")
    done = again.build()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " compiled, " in line]
    assert len(lines) == len(CODES) * CALLS
    assert all(": 0 compiled, " in line for line in lines)
    assert again.targets == built.targets
    assert {target["compiled"] for target in built.targets.values()} == {KERNELS}


def test_what_was_compiled_is_told_in_short(built: TritonBuild) -> None:
    done = built.run(DOCKER / "precompiled/record.py", built.out / "manifest.json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["machine"].endswith(", without a GPU")
    assert told["fingerprint"]["triton"] != "absent"
    whole = built.targets["sm_90"]
    kept = {key: value for key, value in whole.items() if key != "entries"}
    assert told["targets"]["sm_90"] == {**kept, "calls": CALLS}


@pytest.mark.parametrize("device", CODES)
def test_a_gpu_finds_every_entry(built: TritonBuild, tmp_path: Path, device: str) -> None:
    start(device, shipped=built.out, cache=tmp_path / "cache")
    done = built.look_up(device, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(built.targets[device]["entries"])


def test_what_is_shipped_may_be_read_only(built: TritonBuild, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shutil.copytree(built.out, shipped)
    for path in [shipped, *shipped.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    before = contents(shipped)
    start("sm_90", shipped=shipped, cache=tmp_path / "cache")
    done = built.look_up("sm_90", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    # root may write it all the same.
    assert contents(shipped) == before
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "cache").rglob("*"))


def test_an_entry_that_is_not_there_is_noticed(built: TritonBuild, tmp_path: Path) -> None:
    shipped = tmp_path / "shipped"
    shutil.copytree(built.out, shipped)
    shutil.rmtree(next((shipped / "sm_90").iterdir()))
    start("sm_90", shipped=shipped, cache=tmp_path / "cache")
    done = built.look_up("sm_90", tmp_path / "cache")
    assert (done.returncode, done.stderr) == (1, "simulated_gpu: it would compile\n")


def test_an_entry_for_another_gpu_ends_the_build(built: TritonBuild, tmp_path: Path) -> None:
    asked = json.loads(built.set_file.read_text())
    asked["targets"] = {"sm_90": {"code": "sm_90"}}
    (tmp_path / "set.json").write_text(json.dumps(asked))
    wrong = TritonBuild(built.python, tmp_path / "set.json", built.state, tmp_path / "out")
    assert "has code for ('sm_90a',), needed sm_90 once" in wrong.build().stderr
    assert not (wrong.out / "manifest.json").exists()

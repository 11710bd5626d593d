"""FlashAttention-4's kernels are compiled without a GPU, and found by a machine that has one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SETS, FA4Build, run

from attnimg.machine.fingerprint import RELEASE
from recipes.artifact.elf import read_elf

SIMULATED = Path(__file__).with_name("simulated_gpu.py")
# What the image's probe gets from the driver.
GPUS = {
    "sm_90": "NVIDIA H100 80GB HBM3, 9.0, 81559, 590.10",
    "sm_100": "NVIDIA B200, 10.0, 183359, 590.10",
    "sm_103": "NVIDIA B300, 10.3, 275040, 590.10",
    "sm_120": "NVIDIA GeForce RTX 5090, 12.0, 32607, 590.10",
    "sm_121": "NVIDIA GB10, 12.1, [N/A], 590.10",
}
SETTINGS = """
import json, os, pathlib, sys
from attnimg.machine.kernel_cache import fa4_settings
from attnimg.machine.probe import this_machine
print(json.dumps(fa4_settings(this_machine(()), os.environ, shipped=pathlib.Path(sys.argv[1]))))
"""

ASKING = """
import json
from attnimg.machine.fingerprint import RELEASE, fingerprint
print(json.dumps(fingerprint()[RELEASE]))
"""


def entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Return each entry of a set with the machine code that its folder declares."""
    for device, target in json.loads((folder / "manifest.json").read_text())["targets"].items():
        for path in sorted((folder / device).rglob("*.o")):
            yield target["code"], path


def settings(python: Path, *, kernels: Path, device: str, folder: Path) -> dict[str, str]:
    """Ask what a start on a machine with that GPU sets; its caches lie in `folder`."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir(parents=True, exist_ok=True)
    smi.write_text(f"#!/bin/sh\necho '{GPUS[device]}'\n")
    smi.chmod(0o755)
    env = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"ATTNIMG_CACHE": str(folder / "cache"), "TMPDIR": str(folder)}
    return json.loads(run(python, "-c", SETTINGS, kernels, **env))


def found_on(python: Path, device: str, set_file: Path, variables: dict[str, str]) -> set[str]:
    """Name the entries that a simulated GPU loads and whose host code runs; a miss ends it."""
    said = run(python, "-Wignore", SIMULATED, set_file, device, **variables)
    return {name for name, ran in json.loads(said.splitlines()[-1]).items() if ran}


def entries_of(record: Path) -> list[str]:
    """Name the entries that the one call of a part needs, as its worker left them."""
    (call,) = json.loads(record.read_text())["calls"].values()
    return call["entries"]


def test_the_set_has_every_kind_of_kernel(built: FA4Build) -> None:
    target = built.manifest["targets"]["sm_90"]
    assert len(target["calls"]) == 4, "dense and varlen, with gradient and without"
    kinds = {name.partition("/")[0] for name in target["entries"]}
    assert kinds == {"fwd", "bwd_pre", "bwd", "bwd_post"}


def test_each_entry_has_code_for_its_folder_s_gpu_alone(built: FA4Build) -> None:
    # Read by the gates' reader, which shares nothing with the one that build.py checks with.
    for code, path in entries(built.out):
        with path.open("rb") as stream:
            assert read_elf(stream).codes == {code}


def test_no_entry_needs_avx(built: FA4Build) -> None:
    for _, path in entries(built.out):
        assert not re.search(r"%[yz]mm|\tv\w+ ", run("objdump", "-d", path))


def test_a_second_build_compiles_nothing_and_gives_the_same(built: FA4Build) -> None:
    before = built.manifest
    lines = [line for line in built.build() if " compiled, " in line]
    assert len(lines) == 4
    assert all(": 0 compiled, " in line for line in lines)
    assert built.manifest == before


def test_an_interrupted_build_compiles_what_is_missing(built: FA4Build) -> None:
    before = built.manifest
    lost = next(built.state.glob("*/sm_90/*/bwd/*.o"))
    content = lost.read_bytes()
    lost.unlink()
    lines = [line for line in built.build() if " compiled, " in line]
    assert sum(": 1 compiled, " in line for line in lines) == 1
    assert lost.read_bytes() == content
    assert built.manifest["targets"]["sm_90"]["sha256"] == before["targets"]["sm_90"]["sha256"]


def test_a_gpu_finds_every_entry(built: FA4Build, tmp_path: Path) -> None:
    variables = settings(built.python, kernels=built.out, device="sm_90", folder=tmp_path)
    found = found_on(built.python, "sm_90", built.set_file, variables)
    assert found == set(built.manifest["targets"]["sm_90"]["entries"])


def test_a_b200_finds_every_entry(built_for_b200: FA4Build, tmp_path: Path) -> None:
    small = built_for_b200
    variables = settings(small.python, kernels=small.out, device="sm_100", folder=tmp_path)
    found = found_on(small.python, "sm_100", small.set_file, variables)
    assert found == set(small.manifest["targets"]["sm_100"]["entries"])


def test_another_patch_release_of_python_builds_on_the_same_state(
    built_for_b200: FA4Build, tmp_path: Path
) -> None:
    # As a Python that pickles an enum in the other way leaves it: its own name in the record.
    (record,) = built_for_b200.state.glob("*/sm_100/calls/*.json")
    before, wrong = entries_of(record), json.loads(record.read_text())
    (call,) = wrong["calls"].values()
    name = next(name for name in call["entries"] if name.startswith("bwd_post/"))
    call["entries"] = [*(set(call["entries"]) - {name}), "bwd_post/other.o"]
    record.write_text(json.dumps(wrong))
    assert entries_of(record) != before
    assert any(": 0 compiled, " in line for line in built_for_b200.build())
    assert entries_of(record) == before


def test_flashattention_4_stores_a_kernel_beside_them(built: FA4Build, tmp_path: Path) -> None:
    variables = settings(built.python, kernels=built.out, device="sm_90", folder=tmp_path)
    copy = Path(variables["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
    lost = next(copy.rglob("fwd/*.o"))
    lost.unlink()
    done = subprocess.run(
        [built.python, "-Wignore", SIMULATED, built.set_file, "sm_90"],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"fwd/{lost.name} is not there" in done.stderr, "a miss is seen as one"
    assert lost.with_suffix(".lock").exists(), "the look-up could write its lock"


def test_an_entry_for_another_gpu_ends_the_build(built: FA4Build, tmp_path: Path) -> None:
    asked = json.loads(built.set_file.read_text())
    asked["targets"]["sm_90"]["code"] = "sm_90"
    (tmp_path / "set.json").write_text(json.dumps(asked))
    shutil.copytree(built.state, tmp_path / "state")
    wrong = FA4Build(built.python, tmp_path / "set.json", tmp_path / "state", tmp_path / "out")
    with pytest.raises(AssertionError, match="has code for"):
        wrong.build()
    assert not (wrong.out / "manifest.json").exists()


def finished() -> list[tuple[Path, str]]:
    """Return the architectures of the set that FA4_KERNELS names."""
    folder = Path(os.environ.get("FA4_KERNELS", "/nonexistent"))
    if not (folder / "manifest.json").exists():
        return []
    manifest = json.loads((folder / "manifest.json").read_text())
    return [(folder, device) for device in manifest["targets"]]


@pytest.mark.parametrize(("kernels", "device"), finished())
def test_a_gpu_finds_every_entry_of_the_whole_set(
    python: Path, tmp_path: Path, kernels: Path, device: str
) -> None:
    image = "hopper" if device == "sm_90" else "blackwell"
    built_by = json.loads((kernels / "manifest.json").read_text())["fingerprint"].get(RELEASE)
    asking = json.loads(run(python, "-c", ASKING, PYTHONPATH=str(ROOT)))
    assert built_by in (None, asking), "rm -r build/fa4; make test/fa4-cache PYTHON=(that release)"
    variables = settings(python, kernels=kernels, device=device, folder=tmp_path)
    found = found_on(python, device, SETS / image / "fa4_kernels.json", variables)
    target = json.loads((kernels / "manifest.json").read_text())["targets"][device]
    assert found == set(target["entries"])
    assert len(found) == target["kernels"]

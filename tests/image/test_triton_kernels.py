"""A GPU would find every Triton kernel that the image has compiled, in a process of its own.

The GPU is made up by docker/precompiled/triton/stand_in.py; the packages, the entries and their
copy at start are the image's. An image whose recipe has no such kernels skips.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import GID, ROOT, UID, Run

SHIPPED = "/opt/attnimg/triton"
MANIFEST = f"cat {SHIPPED}/manifest.json"
# The name and driver do not matter; what a start copies is chosen by the capability.
SMI = "#!/bin/sh\necho 'NVIDIA GPU, {capability}, 81559, 590.10'\n"
# What the build compiles on, and this test runs by.
MOUNTED = ("docker", "tests/precompiled/triton")
LOOK_UP = (
    'set -e; test ! -w {shipped}; PYTHONPATH="{path}" python -BWignore '
    "/repo/tests/precompiled/triton/simulated_gpu.py "
    "/repo/docker/images/{image}/triton_kernels.json {device}"
)


@pytest.fixture(scope="module")
def targets(docker: Run, image: str) -> dict[str, Any]:
    """What the image has, by architecture: all that its recipe promises."""
    promised = ROOT / "docker/images" / image.rpartition(":")[2] / "triton_kernels.json"
    if not promised.exists():
        pytest.skip(f"the recipe of {image} has no Triton kernels: there is no {promised}")
    done = docker("bash", "-c", MANIFEST, options=("--entrypoint=",))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["targets"]
    assert found.keys() == json.loads(promised.read_text())["targets"].keys()
    return found


def gpu(device: str, folder: Path) -> tuple[str, ...]:
    """Options of a container that seems to have such a GPU."""
    digits = device.removeprefix("sm_")
    smi = folder / "nvidia-smi"
    smi.write_text(SMI.format(capability=f"{digits[:-1]}.{digits[-1]}"))
    smi.chmod(0o755)
    return (f"--volume={smi}:/usr/local/bin/nvidia-smi:ro",)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--user=1000",), id="the image's user"),
        pytest.param(
            (f"--user={UID}:{GID}", "--read-only", "--tmpfs=/cache:mode=1777"),
            id="any user, read-only but for the caches",
        ),
    ],
)
def test_a_gpu_finds_every_triton_kernel(
    docker: Run, image: str, targets: dict[str, Any], tmp_path: Path, options: tuple[str, ...]
) -> None:
    for device, target in targets.items():
        done = docker(
            "bash", "-c", LOOK_UP.format(
                shipped=SHIPPED, path=f"/repo/{MOUNTED[0]}", device=device,
                image=image.rpartition(":")[2],
            ),
            options=(
                "--network=none", *gpu(device, tmp_path), *options,
                *(f"--volume={ROOT}/{folder}:/repo/{folder}:ro" for folder in MOUNTED),
            ),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == sorted(target["entries"])
        assert len(target["entries"]) == target["kernels"]


def test_doctor_says_that_triton_kernels_are_found(
    docker: Run, targets: dict[str, Any], tmp_path: Path
) -> None:
    device, target = next(iter(targets.items()))
    done = docker("doctor", "--json", options=("--network=none", *gpu(device, tmp_path)))
    checks = {check["code"]: check for check in json.loads(done.stdout)["checks"]}
    what = f"SageAttention finds its Triton kernels for {device} compiled: {target['kernels']}"
    assert checks["triton-kernels"]["what"] == what

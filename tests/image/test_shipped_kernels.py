"""At start, the kernels that came with the image are where FlashAttention-4 may write.

The GPU is a program that answers as nvidia-smi does, and the kernels are made up, so that every
image can be asked, the one for the CPU too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GID, UID, Run

SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 81559, 590.10'\n"
FINGERPRINT = (
    "import json; from attnimg.machine.fingerprint import cache_key, fingerprint\n"
    "f = fingerprint()\n"
    "targets = {'sm_90': {'kernels': 1}}\n"
    "print(json.dumps({'key': cache_key(f), 'fingerprint': f, 'targets': targets}))"
)
# What FlashAttention-4 does for each look-up, and for each kernel that it adds.
LOOK_UP = """
set -e; cd "$FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"; pwd
test "$FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED" = 1
cat 0123/fwd/4567.o; touch 0123/fwd/4567.lock 0123/fwd/new.o; mkdir -p 0123/bwd
"""


@pytest.fixture(scope="module")
def gpu(docker: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Options of a container that has a GPU and kernels for it, which nobody may change."""
    folder = tmp_path_factory.mktemp("gpu")
    manifest = docker("python", "-c", FINGERPRINT)
    assert manifest.returncode == 0, manifest.stderr
    entry = folder / "fa4" / "sm_90" / "0123" / "fwd" / "4567.o"
    entry.parent.mkdir(parents=True)
    entry.write_text("kernel ")
    (folder / "fa4" / "manifest.json").write_text(manifest.stdout)
    (folder / "nvidia-smi").write_text(SMI)
    (folder / "nvidia-smi").chmod(0o755)
    return (
        "--network=none",
        f"--volume={folder}/fa4:/opt/attnimg/fa4:ro",
        f"--volume={folder}/nvidia-smi:/usr/local/bin/nvidia-smi:ro",
    )


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[str]:
    """A cache that several containers share."""
    name = f"attnimg-test-{os.getpid()}-{tmp_path.name}"
    yield name
    subprocess.run(["docker", "volume", "rm", "-f", name], check=False, capture_output=True)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        pytest.param((), "/cache/flash-attn-4-", id="the image's user"),
        pytest.param((f"--user={UID}:{GID}",), "/cache/flash-attn-4-", id="any user"),
        pytest.param(("--user=0",), "/cache/flash-attn-4-", id="root"),
        pytest.param(
            (f"--user={UID}:{GID}", "--read-only", "--tmpfs=/cache:mode=1777"),
            "/cache/flash-attn-4-",
            id="a read-only container with one volume",
        ),
        pytest.param(
            (f"--user={UID}:{GID}", "--read-only"), "/dev/shm/", id="nothing but shared memory"
        ),
    ],
)
def test_a_program_finds_them(
    docker: Run, gpu: tuple[str, ...], options: tuple[str, ...], where: str
) -> None:
    done = docker("bash", "-c", LOOK_UP, options=(*gpu, *options))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(where)
    assert done.stdout.endswith("kernel ")


def test_users_who_share_a_cache_do_not_share_what_they_load(
    docker: Run, gpu: tuple[str, ...], volume: str
) -> None:
    shared = (*gpu, f"--volume={volume}:/cache")
    runs = [
        docker("bash", "-c", LOOK_UP, options=(*shared, f"--user={user}"))
        for user in (f"{UID}:{GID}", f"{UID}:{GID}", "1000:1000")
    ]
    assert [done.returncode for done in runs] == [0, 0, 0], runs[-1].stderr
    first, second, other = (done.stdout.splitlines()[0] for done in runs)
    assert first == second
    assert other != first


@pytest.mark.parametrize(
    ("options", "left"),
    [
        pytest.param((), "[]", id="without a GPU nothing is set"),
        pytest.param(
            ("--env=FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=0",),
            "[FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=0]",
            id="a person's own setting stays",
        ),
    ],
)
def test_otherwise_nothing_is_set_or_said(
    docker: Run, gpu: tuple[str, ...], options: tuple[str, ...], left: str
) -> None:
    ask = 'v=$(env | grep ^FLASH_ATTENTION_ || true); echo "[$v]"'
    done = docker("bash", "-c", ask, options=(*options, *(gpu if options else ())))
    assert (done.stdout.strip(), done.stderr) == (left, "")


def test_doctor_says_that_they_are_found(docker: Run, gpu: tuple[str, ...]) -> None:
    done = docker("doctor", "--json", options=gpu)
    checks = {check["code"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["kernels"]["status"] == "ok"
    assert "its kernels for sm_90 compiled: 1" in checks["kernels"]["what"]

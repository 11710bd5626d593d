"""The image under Podman itself, from Debian's packages: `make podman` installs it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import GID, UID, faults
from runtimes import WRITE, seen, write_driver

USER = f"--user={UID}:{GID}"
Podman = Callable[..., "subprocess.CompletedProcess[str]"]
# Podman's own limits are above those that some virtual machines allow.
LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000")


@pytest.fixture(scope="module")
def podman(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Run the image, loaded into a storage of its own: podman(arguments, options=...)."""
    if shutil.which("podman") is None:
        pytest.skip("no podman; make podman installs it")
    folder = tmp_path_factory.mktemp("podman")
    command = ["podman", f"--root={folder}/root", f"--runroot={folder}/run"]
    with subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as saved:
        load = [*command, "load", "--quiet"]
        done = subprocess.run(load, stdin=saved.stdout, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    def run(*arguments: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        line = [*command, "run", "--rm", "--network=none", *LIMITS, *options, image, *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)

    yield run
    # pytest would keep the folder, a gigabyte. Podman leaves its storage mounted.
    subprocess.run(["umount", "--recursive", folder / "root" / "overlay"], check=False)
    shutil.rmtree(folder)


def test_doctor_finds_nothing_wrong(podman: Podman) -> None:
    done = podman("doctor", options=(USER,))
    assert faults(done.stdout) == [], done.stderr
    assert f"/cache/huggingface-{UID}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("options", "base"),
    [
        pytest.param((USER,), "/cache", id="entrypoint bypassed"),
        pytest.param((USER, "--read-only"), f"/tmp/attnimg-{UID}", id="its tmpfs on /tmp"),
        pytest.param(
            (USER, "--read-only", "--read-only-tmpfs=false"), f"/dev/shm/attnimg-{UID}",
            id="nothing but shared memory",
        ),
    ],
)  # fmt: skip
def test_every_folder_is_writable(podman: Podman, options: tuple[str, ...], base: str) -> None:
    done = podman("-c", WRITE, options=("--entrypoint=python", *options))
    assert done.returncode == 0, done.stderr
    assert all(folder.startswith(f"{base}/") for folder in json.loads(done.stdout).values())


def test_the_gpu_is_seen(podman: Podman, image: str, tmp_path: Path) -> None:
    # Where --device nvidia.com/gpu=all mounts the files of a CDI specification.
    driver = write_driver(tmp_path / "driver", image)
    places = {
        driver / "bin" / "nvidia-smi": "/usr/bin/nvidia-smi",
        driver / "lib64" / "libcuda.so.1": "/usr/lib/x86_64-linux-gnu/libcuda.so.1",
    }
    mounts = tuple(f"--volume={file}:{place}:ro" for file, place in places.items())
    done = podman("doctor", options=mounts)
    assert seen(image) in done.stdout, done.stdout + done.stderr
    assert faults(done.stdout) == []
    without = podman("doctor", options=mounts[:1])
    assert "programs can't load the driver's library" in without.stdout


def test_tini_does_not_complain_under_podman_s_init(podman: Podman) -> None:
    if not Path("/usr/libexec/podman/catatonit").exists():
        pytest.skip("no catatonit, Podman's init; make podman installs it")
    done = podman("--version", options=("--init",))
    assert (done.returncode, done.stderr) == (0, "")

"""The image as container runtimes start it: the place of the driver, the user, what is writable.

Docker runs all of them. Kubernetes, enroot and Apptainer are simulated: Docker gets the
environment, the user, the mounts and the command line that they document, and the names of these
tests contain "simulated". test_podman.py runs Podman itself.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GID, UID, Run, faults, losses, mounted
from runtimes import WRITE, image_for_the_gpu, seen, write_driver

USER = f"--user={UID}:{GID}"
READ_ONLY = ("--read-only", "--network=none")
# Programs that the entrypoint does not start, as with `command:` of Kubernetes.
PYTHON, ATTNIMG = "--entrypoint=python", "--entrypoint=attnimg"
KUBERNETES = (USER, *READ_ONLY, "--env=KUBERNETES_SERVICE_HOST=10.0.0.1")


@pytest.fixture(scope="module")
def driver(image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a driver's files, which report a GPU of the image; an H100 for cpu."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc, which compiles the library of a driver without a GPU")
    return write_driver(tmp_path_factory.mktemp("driver"), image)


def mount(driver: Path, **places: str) -> tuple[str, ...]:
    """Return options that mount nvidia-smi and libcuda.so.1 at places of a container."""
    files = {"smi": driver / "bin" / "nvidia-smi", "cuda": driver / "lib64" / "libcuda.so.1"}
    return tuple(f"--volume={files[name]}:{place}:ro" for name, place in places.items())


def wrote(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the folders that WRITE has written to."""
    assert done.returncode == 0, done.stderr
    folders: dict[str, str] = json.loads(done.stdout)
    return folders


# ---- the GPU ------------------------------------------------------------------------------------

SYSTEM = {"smi": "/usr/bin/nvidia-smi", "cuda": "/usr/lib/x86_64-linux-gnu/libcuda.so.1"}
BASE_PATH = "/opt/venv/bin:/usr/bin:/bin"


@pytest.mark.parametrize(
    ("places", "options"),
    [
        pytest.param(SYSTEM, (), id="NVIDIA's runtime, simulated: files in system folders"),
        pytest.param({}, ("gke",), id="GKE, simulated: /usr/local/nvidia"),
        pytest.param(
            {},
            ("gke", ATTNIMG, "--env=LD_LIBRARY_PATH=/mine", f"--env=PATH={BASE_PATH}"),
            id="GKE, simulated: in a pod that sets LD_LIBRARY_PATH and PATH, with a command",
        ),
        pytest.param(
            {"smi": "/usr/bin/nvidia-smi", "cuda": "/.singularity.d/libs/libcuda.so.1"},
            (ATTNIMG, "--env=LD_LIBRARY_PATH=/usr/local/nvidia/lib64:/.singularity.d/libs",
             "--env=APPTAINER_CONTAINER=/x.sif", USER),
            id="apptainer exec --nv, simulated",
        ),
        pytest.param(
            {"smi": "/usr/bin/nvidia-smi", "cuda": "/.singularity.d/libs/libcuda.so.1"},
            (ATTNIMG, "--env=LD_LIBRARY_PATH="),
            id="apptainer exec --nv --cleanenv, simulated: without LD_LIBRARY_PATH",
        ),
    ],
)  # fmt: skip
def test_the_gpu_is_seen(
    docker: Run, image: str, driver: Path, places: dict[str, str], options: tuple[str, ...]
) -> None:
    whole = (f"--volume={driver}:/usr/local/nvidia:ro",) if "gke" in options else ()
    options = (*mount(driver, **places), *whole, *(o for o in options if o != "gke"))
    done = docker("doctor", options=options)
    assert seen(image) in done.stdout, done.stdout + done.stderr
    assert faults(done.stdout) == []
    assert f"attnimg:{image_for_the_gpu(image)}" in done.stdout


def test_a_driver_without_its_compute_part_is_reported(docker: Run, driver: Path) -> None:
    # enroot mounts nvidia-smi alone where NVIDIA_DRIVER_CAPABILITIES has no "compute".
    done = docker("doctor", options=mount(driver, smi="/usr/bin/nvidia-smi"))
    assert done.returncode == 1
    assert "programs can't load the driver's library" in done.stdout
    assert "libcuda.so.1" in done.stdout
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in done.stdout


def test_the_image_says_which_gpus_it_wants(image: str) -> None:
    # enroot's hook and NVIDIA's runtime read it; "all" in the image `cpu` would stop both on a
    # machine without a driver.
    asked = ["docker", "image", "inspect", "--format={{json .Config.Env}}", image]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    variables = dict(entry.split("=", 1) for entry in json.loads(done.stdout))
    wanted = "void" if image.endswith(("cpu", "rocm")) else "all"
    assert variables["NVIDIA_VISIBLE_DEVICES"] == wanted
    assert variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


# ---- folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "base", "home"),
    [
        pytest.param((PYTHON,), "/cache", "/cache/home", id="Docker, entrypoint bypassed"),
        pytest.param(
            (PYTHON, *KUBERNETES), f"/dev/shm/attnimg-{UID}", f"/dev/shm/attnimg-{UID}/home-{UID}",
            id="Kubernetes, simulated: command, readOnlyRootFilesystem, no volume",
        ),
        pytest.param(
            (PYTHON, *KUBERNETES, "--tmpfs=/cache:exec,mode=2775,gid=4399"), "/cache",
            "/cache/home", id="Kubernetes, simulated: command, an emptyDir with fsGroup at /cache",
        ),
        pytest.param(
            (PYTHON, USER, *READ_ONLY, f"--tmpfs=/home/alice:exec,uid={UID}",
             "--env=HOME=/home/alice", "--tmpfs=/tmp:mode=1777"),
            "/home/alice/.cache/attnimg", "/home/alice",
            id="Apptainer, simulated: read-only image, the user's home and /tmp",
        ),
    ],
)  # fmt: skip
def test_every_folder_is_writable(
    docker: Run, options: tuple[str, ...], base: str, home: str
) -> None:
    folders = wrote(docker("-c", WRITE, options=options))
    assert folders.pop("HOME") == home
    # Below a home of the user's own, tools have their default folders.
    assert len(folders) == (1 if home == "/home/alice" else 6)
    assert all(folder.startswith(f"{base}/") for folder in folders.values())


def test_enroot_simulated_starts_a_login_shell(docker: Run) -> None:
    # enroot runs /etc/rc by a login shell, which resets PATH; pyxis skips the entrypoint. Only /tmp
    # is writable, and HOME is the image's.
    options = ("--entrypoint=bash", USER, *READ_ONLY, "--env=SLURM_JOB_ID=7",
               f"--tmpfs=/tmp:exec,mode=755,uid={UID}")  # fmt: skip
    done = docker("-l", "-c", 'exec "$@"', "rc", "python", "-c", WRITE, options=options)
    assert wrote(done)["HF_HOME"] == f"/tmp/attnimg-{UID}/huggingface-{UID}"
    done = docker("-l", "-c", 'exec "$@"', "rc", "attnimg", "doctor", options=options)
    assert f"/cache is not writable for user {UID}; caches are in /tmp/attnimg-{UID}" in done.stdout
    assert faults(done.stdout) == []


def test_users_of_one_volume_have_folders_of_their_own(docker: Run, volume: str) -> None:
    found = [
        wrote(
            docker("python", "-c", WRITE, options=(f"--volume={volume}:/cache", f"--user={user}"))
        )
        for user in ("1000:1000", f"{UID}:{GID}", "5000:0", "1000:1000")
    ]
    assert found[0] == found[3]
    assert len({folder for folders in found for folder in folders.values()}) == 3 * 7


def test_a_volume_of_an_earlier_image_is_found(docker: Run, volume: str) -> None:
    shared = f"--volume={volume}:/cache"
    docker("-c", "import os; os.makedirs('/cache/huggingface/hub')", options=(PYTHON, shared))
    assert (
        wrote(docker("python", "-c", WRITE, options=(shared,)))["HF_HOME"] == "/cache/huggingface"
    )
    other = wrote(docker("python", "-c", WRITE, options=(shared, USER)))
    assert other["HF_HOME"] == f"/cache/huggingface-{UID}"


@pytest.fixture
def volume() -> Iterator[str]:
    """An empty volume, removed after the test."""
    create = ["docker", "volume", "create"]
    name = subprocess.run(create, capture_output=True, text=True, check=True).stdout.strip()
    yield name
    subprocess.run(["docker", "volume", "rm", "-f", name], check=True, capture_output=True)


def test_a_command_trains_where_only_the_working_folder_is_writable(
    docker: Run, workspace: Path
) -> None:
    # Kubernetes, simulated: `command: [attnimg, train, ...]` skips the entrypoint.
    done = docker(
        "train", "examples/demo/demo.yaml", "max_steps=2", "val_set_size=0", "eval_steps=null",
        options=(ATTNIMG, *mounted(workspace), "--read-only"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("caches are in /workspace/.cache") == 1
    out = workspace / "outputs" / "demo" / "trained"
    assert len(losses(out / "metrics.jsonl")) == 2
    assert (out / "model.safetensors").exists()
    assert {(path.stat().st_uid, path.stat().st_gid) for path in out.rglob("*")} == {(UID, GID)}
    assert (workspace / ".cache" / f"inductor-{UID}").is_dir()


# ---- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--init",), id="docker run --init"),
        pytest.param(("--pid=host",), id="enroot and Apptainer, simulated: not process 1"),
    ],
)
def test_tini_does_not_complain_where_it_is_not_process_1(
    docker: Run, options: tuple[str, ...]
) -> None:
    done = docker("--version", options=options)
    assert (done.returncode, done.stderr) == (0, "")


def test_exec_and_healthcheck_see_what_the_entrypoint_chose(
    image: str, driver: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    show = ("python", "-c", "import json, os; print(json.dumps(dict(os.environ)))")
    start = ["docker", "run", "--detach", USER, "--read-only", f"--volume={tmp_path}:/workspace",
             "--health-interval=1s", "--health-start-period=0s", *mount(driver, **SYSTEM), image,
             "bash", "-c", f"{show[0]} -c '{show[2]}' >own.json; sleep 300"]  # fmt: skip
    name = subprocess.run(start, capture_output=True, text=True, check=True).stdout.strip()
    try:
        state = "{{.State.Health.Status}} {{json .State.Health.Log}}"
        for _ in range(120):
            ask = ["docker", "inspect", f"--format={state}", name]
            health = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
            if not health.startswith("starting"):
                break
            time.sleep(0.5)
        command = ["docker", "exec", name, *show]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        subprocess.run(["docker", "rm", "--force", name], capture_output=True, check=True)
    own, inside = json.loads((tmp_path / "own.json").read_text()), json.loads(done.stdout)
    assert own["HF_HOME"] == f"/workspace/.cache/huggingface-{UID}"
    # bash sets the first four; the others depend on the load, which the entrypoint measures.
    differing = {"SHLVL", "OLDPWD", "_", "PWD", "GOMP_SPINCOUNT", "ATTNIMG_THREADS"}
    assert {k: v for k, v in own.items() if k not in differing} == {
        k: v for k, v in inside.items() if k not in differing
    }
    assert int(inside["OMP_NUM_THREADS"]) >= 1
    assert int(inside["GOMP_SPINCOUNT"]) <= 30_000, "as long as by default, without the entrypoint"
    assert health.startswith("healthy"), health


# A parent of 400 MB, with torch, whose child needs more than is left of 600 MB.
FULL = """
import subprocess, sys, tempfile
from attnimg.cgroup import oom_kills
from attnimg.verification import runner
kills, larger = oom_kills(), b"x" * (150 << 20)
code = "import attnimg.verification.worker as w; w._die_before_parent(); b'x' * (1 << 30)"
with tempfile.TemporaryFile() as output:
    child = subprocess.run([sys.executable, "-c", code], stderr=output)
    print(runner._exit_reason(child.returncode, case="x", output=output, kills=kills).text)
"""


def test_a_proof_that_the_memory_limit_kills_is_named(docker: Run) -> None:
    options = (PYTHON, "--network=none", "--memory=600m", "--memory-swap=600m")
    done = docker("-c", FULL, options=options)
    assert done.returncode == 0, done.stderr
    wanted = "as the memory limit of the container or job, 600 MiB, was reached"
    assert done.stdout == f"x: killed by SIGKILL, {wanted}\n"


def test_the_forecast_uses_the_memory_limit(docker: Run, workspace: Path) -> None:
    options = (*mounted(workspace), "--memory=256m", "--memory-swap=256m")
    done = docker("explain", "examples/demo/demo.yaml", options=options)
    assert "more than the 0.2 GiB of this device" in done.stdout + done.stderr

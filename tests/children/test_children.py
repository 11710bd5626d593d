"""JupyterLab, axolotl and an extension in C++, in images made FROM this one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from child_images_record import EXAMPLES, ROOT
from conftest import IMAGE, Child

UID, GID = 4321, 4399


def run(*arguments: str, timeout: int = 1800) -> subprocess.CompletedProcess[str]:
    """Run docker with these arguments."""
    return subprocess.run(
        ["docker", *arguments], capture_output=True, text=True, check=False, timeout=timeout
    )


def gated(child: str) -> subprocess.CompletedProcess[str]:
    """Run the gates on a child image."""
    return subprocess.run(
        ["make", "-o", ".venv/ready", f"gate/{IMAGE.partition(':')[2]}", f"CHILD={child}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


# A notebook's cell is run by the kernel that JupyterLab would start.
CELL = """
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel()
client.execute_interactive("import attnimg, torch; print(attnimg.__name__, torch.__version__)")
manager.shutdown_kernel()
"""


def test_jupyterlab_answers_and_a_cell_imports_attnimg(child: Child) -> None:
    tag = child("jupyter", context=EXAMPLES / "jupyter")
    name = f"attnimg-test-jupyter-{os.getpid()}"
    user = (f"--user={UID}:{GID}", "--env=JUPYTER_TOKEN=token")
    started = run("run", "--detach", "--rm", f"--name={name}", *user, tag)
    assert started.returncode == 0, started.stderr
    try:
        address = run("inspect", "--format={{.NetworkSettings.IPAddress}}", name).stdout.strip()
        deadline, answer = time.monotonic() + 300, {}
        while not answer and time.monotonic() < deadline:
            time.sleep(2)
            request = f"http://{address}:8888/api/status?token=token"
            try:
                with urllib.request.urlopen(request, timeout=5) as reply:
                    answer = json.load(reply)
            except OSError:
                continue
        assert "kernels" in answer, run("logs", name).stderr
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://{address}:8888/api/status", timeout=30)
        cell = run("exec", name, "python", "-c", CELL)
        assert cell.stdout.startswith("attnimg 2."), cell.stderr
    finally:
        run("rm", "--force", name)
    gate = gated(tag)
    assert gate.returncode == 0, gate.stdout
    assert "the child's own: argon2-cffi" in gate.stdout


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with examples and the untrained model of the demo, as a person would mount it."""
    prepare = [
        sys.executable,
        str(ROOT / "examples/demo/prepare.py"),
        str(tmp_path / "outputs/demo"),
    ]
    subprocess.run(prepare, check=True, capture_output=True)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, UID, GID)
    return tmp_path


def test_axolotl_trains_on_the_image_s_torch_with_a_verified_backend(
    child: Child, workspace: Path
) -> None:
    tag = child("axolotl", context=ROOT / "requirements")
    options = ("--rm", "--network=none", f"--user={UID}:{GID}", f"--volume={workspace}:/workspace")
    where = "import torch, transformers, attnimg; print(torch, transformers, attnimg)"
    paths = run("run", *options, tag, "python", "-c", where).stdout
    assert "'/opt/venv/lib/python3.11/site-packages/torch/" in paths
    assert "'/opt/axolotl/lib/python3.11/site-packages/transformers/" in paths
    # attnimg's own commands have the image's transformers.
    doctor = run("run", *options, tag, "/opt/venv/bin/attnimg", "doctor")
    assert "packages have the versions of the image" in doctor.stdout

    config = "examples/trainer/axolotl.yaml"
    train = ("axolotl", "train", config, "--launcher", "python", "--max-steps", "3")
    done = run("run", "--env=HF_HUB_OFFLINE=1", "--env=OMP_NUM_THREADS=1", *options, tag, *train)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(re.findall(r"'loss': '?[\d.]+", done.stdout + done.stderr)) >= 3
    written = json.loads((workspace / "outputs/axolotl/trained/attnimg.json").read_text())
    assert (written["chosen"]["backend"], written["verified"]) == ("sdpa", True)


def test_an_extension_is_compiled_beside_the_image_and_called_in_it(child: Child) -> None:
    tag = child("extension", context=EXAMPLES / "extension")
    call = "import torch, scaled_sum; print(scaled_sum.scaled_sum(torch.ones(3), 2.0).item())"
    done = run("run", "--rm", "--network=none", f"--user={UID}:{GID}", tag, "python", "-c", call)
    assert done.stdout == "6.0\n", done.stderr
    doctor = run("run", "--rm", tag, "doctor")
    assert "scaled-sum 1.0" in doctor.stdout
    # The compiler stays in the other image.
    assert run("run", "--rm", tag, "bash", "-c", "command -v c++").returncode != 0

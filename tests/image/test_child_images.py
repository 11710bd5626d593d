"""Images made FROM this one, and packages installed in its containers: torch can't be replaced.

The children that take minutes (JupyterLab, axolotl, an extension in C++) are in tests/children.
"""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import GID, UID, Run, faults
from small_image import package

CA = Path("/etc/ssl/certs/ca-certificates.crt")
INSTALL = "--mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt pip install "
# A network whose proxy has its own CA: the run gets the machine's certificates.
CERTIFICATES = (f"--volume={CA}:{CA}:ro",) if CA.exists() else ()
CHILD = "attnimg-test-child"


def build(
    image: str, folder: Path, *, run: str, tag: str = CHILD
) -> subprocess.CompletedProcess[str]:
    """Build FROM the image with one RUN, as a person's Dockerfile would have it."""
    dockerfile = f"FROM {image}\nUSER root\nRUN {run}\nUSER 1000:1000\n"
    (folder / "Dockerfile").write_text(dockerfile)
    secret = ["--secret", f"id=ca,src={CA}"] if CA.exists() else []
    return subprocess.run(
        ["docker", "build", "--progress=plain", f"--tag={tag}", *secret, str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def child(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image with another package, and with another version of one that may differ."""
    tag = f"{CHILD}-packages"
    packages = "einops sentencepiece 'packaging==26.0'"
    done = build(image, tmp_path_factory.mktemp("child"), run=INSTALL + packages, tag=tag)
    assert done.returncode == 0, done.stderr
    yield tag
    subprocess.run(["docker", "rmi", "--force", tag], capture_output=True, check=False)


def test_a_child_image_adds_packages_and_may_have_other_versions(child: str) -> None:
    command = ["docker", "run", "--rm", child, "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    # An image for GPUs has that one failure where no GPU is visible.
    assert ran.returncode == int("no GPU is visible" in ran.stdout), ran.stdout
    assert faults(ran.stdout) == []
    assert "changed since attnimg:" in ran.stdout
    assert "packaging 26.3 -> 26.0" in ran.stdout
    assert "einops" in ran.stdout
    assert "sentencepiece" in ran.stdout


def test_the_tests_of_the_image_pass_in_a_child(child: str) -> None:
    """Those of packages; the training run is the image's own test."""
    command = ["docker", "run", "--rm", "--network=none", child, "selftest", "--only", "packages"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("torch==2.12.1", id="another torch"),
        pytest.param("--upgrade 'torch>=2.15'", id="a newer torch"),
    ],
)
def test_a_child_image_that_would_replace_a_pin_is_refused(
    image: str, tmp_path: Path, command: str
) -> None:
    done = build(image, tmp_path, run=INSTALL + command)
    assert done.returncode != 0
    assert "(constraint)" in done.stderr
    assert "conflict" in done.stderr


def test_doctor_finds_a_torch_that_was_forced_in(image: str, tmp_path: Path) -> None:
    metadata = "/opt/venv/lib/python3.11/site-packages/torch-*.dist-info/METADATA"
    forced = build(image, tmp_path, run=f"sed -i 's/^Version: .*/Version: 2.1.0/' {metadata}")
    assert forced.returncode == 0, forced.stderr
    doctor = ["docker", "run", "--rm", CHILD, "doctor"]
    ran = subprocess.run(doctor, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "2.1.0" in ran.stdout


# As any user: a new package, another version of an image's one by uv, a torch that is refused, and
# what Python and attnimg's commands then see.
AS_A_USER = """
set -euo pipefail
pip install -q uv einops
uv pip install -q 'rich==14.3.0'
(pip install -q 'torch==2.12.1' 2>&1 || true) | grep -q ResolutionImpossible
! uv pip install -q 'torch==2.12.1' 2>/dev/null
pip install -q --user six
! pip uninstall -qy torch 2>/dev/null
! uv pip uninstall -q torch 2>/dev/null
python -c 'import einops, rich, six, torch; print(einops.__file__, rich.__file__, torch.__file__)'
/opt/added/bin/python -c 'from importlib.metadata import entry_points as found
found(group="distutils.commands", name="dist_info")["dist_info"]'
(python -m attnimg doctor --json || true) | python -c 'import json, sys; json.load(sys.stdin)'
attnimg doctor || true  # an image for GPUs fails where no GPU is visible
"""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((f"--user={UID}:{GID}",), id="any user"),
        pytest.param(
            ("--read-only", "--tmpfs=/tmp", "--tmpfs=/opt/added:exec,mode=1777"),
            id="the image's user, on a read-only root with a tmpfs for packages",
        ),
    ],
)
def test_packages_of_a_user_come_before_the_image_s(docker: Run, options: tuple[str, ...]) -> None:
    done = docker("bash", "-c", AS_A_USER, options=(*options, *CERTIFICATES))
    assert done.returncode == 0, done.stderr
    einops, rich, torch = done.stdout.splitlines()[0].split()
    assert einops.startswith("/opt/added/")
    assert rich.startswith("/opt/added/")
    assert torch.startswith("/opt/venv/")
    assert "rich 15.0.0 -> 14.3.0" in done.stdout
    assert "einops" in done.stdout
    assert faults(done.stdout) == []
    assert "a Dockerfile keeps them" in done.stderr


# Without the constraint, as a person does who wants another torch. Forced in, it is found.
ANOTHER_TORCH = """
export PIP_CONSTRAINT=
install() { pip install -q --no-index --no-deps "$@" /wheels/torch-99.0-py3-none-any.whl; }
! install || exit 1
attnimg doctor || true
install --ignore-installed || exit 1
attnimg doctor
test $? = 1
"""


def test_doctor_finds_a_torch_that_a_user_forced_in(docker: Run, tmp_path: Path) -> None:
    wheel = tmp_path / "torch-99.0-py3-none-any.whl"
    files = package("torch", "99.0", site="", __init____py=b"__version__ = '99.0'")
    files["torch-99.0.dist-info/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    tmp_path.chmod(0o755)
    done = docker("bash", "-c", ANOTHER_TORCH, options=(f"--volume={tmp_path}:/wheels:ro",))
    assert done.returncode == 0, done.stderr
    assert "Cannot uninstall torch" in done.stderr
    assert ["torch" in line for line in faults(done.stdout)] == [True]
    assert done.stdout.count(" -> 99.0") == 1


@pytest.mark.parametrize(
    ("options", "why"),
    [
        pytest.param(("--read-only", "--tmpfs=/tmp"), "Read-only file system", id="no place"),
        pytest.param((f"--user={UID}:{GID}",), "Permission denied", id="a folder of root's"),
    ],
)
def test_where_nothing_can_be_installed_the_message_tells_the_dockerfile(
    docker: Run, tmp_path: Path, options: tuple[str, ...], why: str
) -> None:
    tmp_path.chmod(0o755)
    if why == "Permission denied":
        options = (*options, f"--volume={tmp_path}:/opt/added")
    done = docker("pip", "install", "einops", options=options)
    assert done.returncode == 1
    assert "no package can be installed into /opt/added" in done.stderr
    assert why in done.stderr
    assert "RUN pip install" in done.stderr
    assert "--tmpfs /opt/added" in done.stderr
    # What does not install still works.
    assert docker("pip", "list", options=options).returncode == 0


def test_nobody_imports_what_another_user_installed(docker: Run, tmp_path: Path) -> None:
    """Root would run it; and a volume may have the packages of another image."""
    volume = f"--volume={tmp_path}:/opt/added"
    tmp_path.chmod(0o1777)
    make = ("python", "/opt/attnimg/image_venv.py", "/opt/added")
    assert docker(*make, options=(volume, f"--user={UID}:{GID}")).returncode == 0
    other = docker("doctor", options=(volume, "--user=4322:4399"))
    assert f"they belong to user {UID}, this is user 4322" in other.stdout
    refused = docker("pip", "install", "einops", options=(volume, "--user=4322:4399"))
    assert refused.returncode == 1
    assert "another user" in refused.stderr
    own = docker("doctor", options=(volume, f"--user={UID}:{GID}"))
    assert "not used" not in own.stdout
    (tmp_path / "tested.txt").write_text("torch==2.1.0\n")
    stale = docker("doctor", options=(volume, f"--user={UID}:{GID}"))
    assert "installed beside another image" in stale.stdout

"""Images made FROM this one: packages can be added, and torch can't be replaced silently."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import faults

CA = Path("/etc/ssl/certs/ca-certificates.crt")
INSTALL = "--mount=type=secret,id=ca,target=/etc/ssl/certs/ca-certificates.crt pip install "


def build(image: str, folder: Path, *, run: str) -> subprocess.CompletedProcess[str]:
    """Build FROM the image with one RUN, as a person's Dockerfile would have it."""
    dockerfile = f"FROM {image}\nUSER root\nRUN {run}\nUSER 1000:1000\n"
    (folder / "Dockerfile").write_text(dockerfile)
    secret = ["--secret", f"id=ca,src={CA}"] if CA.exists() else []
    return subprocess.run(
        ["docker", "build", "--progress=plain", "--tag=attnimg-test-child", *secret, str(folder)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("--no-cache-dir einops", id="a pure package"),
        pytest.param("--no-cache-dir 'sentencepiece'", id="a package with machine code"),
    ],
)
def test_a_child_image_adds_a_package(image: str, tmp_path: Path, command: str) -> None:
    done = build(image, tmp_path, run=INSTALL + command)
    assert done.returncode == 0, done.stderr
    doctor = ["docker", "run", "--rm", "attnimg-test-child", "doctor"]
    ran = subprocess.run(doctor, capture_output=True, text=True, check=False)
    assert "packages have the versions of the image" in ran.stdout
    assert faults(ran.stdout) == []


@pytest.mark.parametrize(
    "command",
    [
        pytest.param("torch==2.12.1", id="another torch"),
        pytest.param("--upgrade 'torch>=2.15'", id="a newer torch"),
        pytest.param("transformers==4.57.0", id="another transformers"),
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
    doctor = ["docker", "run", "--rm", "attnimg-test-child", "doctor"]
    ran = subprocess.run(doctor, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "2.1.0" in ran.stdout

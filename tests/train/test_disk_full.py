"""A disk that fills up ends the run with a word on it, and costs nothing that was written."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_runs import Fork

PROGRAM = Path(__file__).parents[1] / "fixtures" / "tiny_run.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# One checkpoint of the tiny model is 1,410 KiB; the final model alone, 460 KiB, has no room beside.
FITS_TWO_CHECKPOINTS = "3100k"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that two checkpoints fill; needs the right to mount."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={FITS_TWO_CHECKPOINTS}", "tmpfs", str(disk)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no right to mount a small disk: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def run(folder: Path, **keys: object) -> tuple[int | None, str]:
    settings = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    process = Fork([PROGRAM, folder, *settings], env=ENV)
    errors = process.communicate(timeout=120)[1]
    return process.returncode, errors


def test_a_full_disk_keeps_the_checkpoints_before_it(tmp_path: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    code, errors = run(tmp_path, output_dir=str(out), max_steps=8)

    assert code == 1
    assert "attnimg: the disk is full: checkpoint-6 could not be written" in errors
    assert "checkpoint-4 is kept" in errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert not (out / ".partial").exists(), "what could not be finished is taken away again"
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 6
    assert json.loads((out / "receipt.json").read_text())["error"]["code"] == "disk-full"

    # With room again it goes on where it stood.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    code, errors = run(tmp_path, output_dir=str(out), max_steps=8, resume_from_checkpoint=True)
    assert code == 0, errors
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()
            ] == [1, 2, 3, 4, 5, 6, 7, 8]  # fmt: skip


def test_a_disk_too_full_for_the_model_keeps_the_last_checkpoint(
    tmp_path: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    code, errors = run(tmp_path, output_dir=str(out), max_steps=4, save_steps=2)
    assert code == 1
    assert "the disk is full: model could not be written" in errors
    assert (out / "checkpoint-4" / "model.safetensors").is_file()
    assert not (out / "model.safetensors").exists()

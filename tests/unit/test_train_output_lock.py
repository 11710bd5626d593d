"""One run at a time trains in an output_dir."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from attnimg.errors import AttnimgError
from attnimg.train.check import LOCK_FILE, output_dir_lock, require_unlocked

HOLD = """
import sys
from pathlib import Path
from attnimg.train.check import output_dir_lock
with output_dir_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as process:
        for use in (require_unlocked, lambda folder: output_dir_lock(folder).__enter__()):
            with pytest.raises(AttnimgError, match="another run trains in output_dir") as caught:
                use(tmp_path / "out")
            assert caught.value.code == "output-dir-busy"
            assert f"pid {process.pid} on " in caught.value.why
        process.communicate("")
    require_unlocked(tmp_path / "out")
    with output_dir_lock(tmp_path / "out"):
        pass


def test_a_killed_run_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "out") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    require_unlocked(tmp_path / "out")
    with output_dir_lock(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / LOCK_FILE).read_text()


def test_a_folder_that_is_not_there_is_unlocked(tmp_path: Path) -> None:
    require_unlocked(tmp_path / "out")
    assert not (tmp_path / "out").exists()

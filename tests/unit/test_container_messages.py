"""Messages on memory limits and folders that depend on how a container was started."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
from pathlib import Path

import pytest

from attnimg import pipeline
from attnimg.run_facts import Proof, Reason
from attnimg.train.check import _not_writable
from attnimg.verification import runner


@pytest.mark.parametrize(
    ("limit", "kills", "text"),
    [
        (600 << 20, 1, "as the memory limit of the container or job, 600 MiB, was reached"),
        (600 << 20, 0, "probably because memory ran out"),
        (None, 1, "probably because memory ran out"),
    ],
    ids=["the limit was reached", "another SIGKILL", "no limit"],
)
def test_a_proof_that_sigkill_ended_names_the_memory_limit_if_that_was_the_cause(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, kills: int, text: str
) -> None:
    monkeypatch.setattr(runner, "memory_limit", lambda: limit)
    monkeypatch.setattr(runner, "oom_kills", lambda: 4 + kills)
    with tempfile.TemporaryFile() as output:
        reason = runner._exit_reason(-signal.SIGKILL, case="x", output=output, kills=4)
    assert (reason.code, reason.text) == ("oom", f"x: killed by SIGKILL, {text}")


@pytest.mark.parametrize("limit", [600 << 20, None])
def test_the_advice_after_out_of_memory_names_the_limit_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    monkeypatch.setattr(pipeline, "memory_limit", lambda: limit)
    proof = Proof(backend="sdpa", reasons=(Reason(code="oom", text="killed"),), seconds=1.0)
    advice = pipeline._failed_proof(proof, do="set it").do
    assert ("raise the memory limit" in advice) == (limit is not None)


@pytest.mark.parametrize(
    ("number", "mode", "why", "do"),
    [
        (errno.EROFS, 0o755, "Read-only file system", "set output_dir elsewhere"),
        (errno.EACCES, 0o555, "its mode is dr-xr-xr-x", "chmod u+wx"),
    ],
    ids=["a read-only mount", "a folder of this user's own"],
)
def test_a_folder_that_can_t_be_written_to_is_reported_with_its_mode(
    tmp_path: Path, number: int, mode: int, why: str, do: str
) -> None:
    tmp_path.chmod(mode)
    error = _not_writable(tmp_path / "new", tmp_path, OSError(number, os.strerror(number)))
    tmp_path.chmod(0o755)
    assert why in error.why
    assert do in error.do
    assert "belongs to user" not in error.why

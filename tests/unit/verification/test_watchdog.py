"""A kernel that hangs is a timeout; one that waits for a CPU is not, however long it takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from run_facts import a_geometry
from served_kernels import serve

from attnimg.run_facts import Proof
from attnimg.verification.runner import Candidate, Limits, Watchdog, counted_time, read_usage, run

SMALL = a_geometry(heads=2, kv_heads=1, head_dim_qk=16, head_dim_v=16, sequence_len=64)
SPIN = "while True: pass"


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("cpu_s", "asleep", "charged"),
    [
        pytest.param(0.5, False, 0.5, id="half a CPU is charged by half"),
        pytest.param(0.0, False, 0.0, id="waiting for a CPU is free"),
        pytest.param(0.0, True, 1.0, id="sleeping is not"),
        pytest.param(8.0, False, 1.0, id="eight threads age no faster than the clock"),
        pytest.param(-0.1, False, 0.0, id="a child that nobody waited for takes its time with it"),
    ],
)
def test_what_a_second_counts(cpu_s: float, asleep: bool, charged: float) -> None:
    assert counted_time(1.0, cpu_s=cpu_s, asleep=asleep) == charged


def test_a_process_is_seen_with_all_that_it_started() -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPIN!r}])"
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        try:
            watchdog = Watchdog(process.pid, Limits(limit_s=0.5, wall_s=60.0))
            while not watchdog.expired():
                time.sleep(0.05)
            usage = read_usage(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert usage.cpu_s > 0.4
    assert not usage.asleep
    assert watchdog.description() == "still running after 0.5 s"


def test_a_process_that_is_gone_has_done_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert read_usage(process.pid) == (0.0, True)


def proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, limit_s: float) -> Proof:
    monkeypatch.setenv("LOCAL_KERNELS", f"wrong/kernel={serve(tmp_path / 'kernel', fault)}")
    candidate = Candidate(backend="wrong/kernel", geometries=(SMALL,), trusted=True)
    (proof,) = run([candidate], device="cpu", timeout_s=limit_s)
    return proof


@pytest.mark.parametrize(
    "fault", ["hang", "hang in naps", "hang unheard", "spin", "spin in a child"]
)
def test_a_kernel_that_hangs_is_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    proof = proven(tmp_path, monkeypatch, fault, 2.0)
    assert [reason.code for reason in proof.reasons] == ["timeout"]
    assert "still running after 2 s" in proof.reasons[0].text


def test_a_starved_proof_passes_however_long_it_takes() -> None:
    stopped: list[float] = []

    def stop_for_a_while(_: str) -> None:
        (child,) = children()
        os.kill(child, signal.SIGSTOP)
        stopped.append(time.monotonic())
        threading.Timer(6.0, os.kill, (child, signal.SIGCONT)).start()

    candidate = Candidate(backend="sdpa", geometries=(SMALL,))
    (proof,) = run([candidate], device="cpu", timeout_s=5.0, log=stop_for_a_while)
    assert proof.reasons == ()
    assert time.monotonic() - stopped[0] > 6.0


def test_a_proof_that_never_gets_a_cpu_ends_all_the_same() -> None:
    candidate = Candidate(backend="sdpa", geometries=(SMALL,))
    (proof,) = run(
        [candidate],
        device="cpu",
        wall_s=2.0,
        log=lambda _: os.kill(children()[0], signal.SIGSTOP),
    )
    assert [reason.code for reason in proof.reasons] == ["timeout"]
    assert "still running after 2 s, 0 s of them with a CPU" in proof.reasons[0].text


def children() -> list[int]:
    """List the children of this process that prove."""
    listed = [
        int(pid)
        for path in Path("/proc/self/task").glob("*/children")
        for pid in path.read_text().split()
    ]
    return [pid for pid in listed if b"attnimg.verification.worker" in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()

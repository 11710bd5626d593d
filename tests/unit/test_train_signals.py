"""What the first signal does, and the second."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from attnimg.train.distributed import ONE_SIGNAL_SECONDS, StopFlag, Stopped, stop_signals


def test_before_training_a_signal_stops_at_once() -> None:
    with stop_signals(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert (caught.value.exit_code, caught.value.checkpoint) == (143, None)


def test_while_training_a_signal_waits_for_the_step() -> None:
    with stop_signals() as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT


@pytest.mark.parametrize(
    ("later", "stops"),
    [
        pytest.param(0.5 * ONE_SIGNAL_SECONDS, False, id="torchrun's echo of Ctrl-C is one wish"),
        pytest.param(1.5 * ONE_SIGNAL_SECONDS, True, id="a second wish stops at once"),
    ],
)
def test_the_second_signal(monkeypatch: pytest.MonkeyPatch, later: float, stops: bool) -> None:
    now = 100.0
    monkeypatch.setattr("attnimg.train.distributed.time.monotonic", lambda: now)
    stop = StopFlag()
    stop.training = True
    stop.receive(signal.SIGINT)
    now += later
    if stops:
        with pytest.raises(Stopped, match="SIGTERM"):
            stop.receive(signal.SIGTERM)
    else:
        stop.receive(signal.SIGTERM)
        assert stop.number == signal.SIGINT


def test_except_exception_does_not_hold_a_stop() -> None:
    assert not issubclass(Stopped, Exception)


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


HANGUP = """
import os, signal, sys, time
from attnimg.train.distributed import stop_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
with stop_signals() as stop:
    stop.training = True
    print("ready", flush=True)
    while stop.number is None:
        time.sleep(0.01)
    print("a line to a terminal that is gone", flush=True)
    with open(sys.argv[1], "w") as file:
        file.write(str(stop.number))
"""


def test_a_terminal_that_hangs_up_stops_the_run_as_sigterm_does(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    program = [sys.executable, "-c", HANGUP, str(tmp_path / "number")]
    with subprocess.Popen(
        program, stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    ) as process:  # fmt: skip
        os.close(slave)
        assert b"ready" in os.read(master, 100)
        os.close(master)
        try:
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
    assert (tmp_path / "number").read_text() == str(int(signal.SIGHUP))


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)

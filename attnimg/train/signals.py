"""Stop on Ctrl-C, SIGTERM and SIGHUP: after the current step and a checkpoint, or at once.

Before training there is nothing to save, so the first signal ends the run where it stands. While
training it only raises a flag, which the engine reads at the end of a step; a second signal ends
the run at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

# A terminal sends Ctrl-C to the whole process group, and torchrun then sends its own signal to
# each worker as well: two signals this close together are one wish.
SAME_WISH_SECONDS = 2.0


class Stopped(BaseException):
    """The run was asked to stop, and did. Like KeyboardInterrupt, no `except Exception` holds it.

    Args:
        number: the signal: 1, 2 or 15.
        step: optimizer steps done.
        checkpoint: what it can go on from; None when no step was done.
    """

    def __init__(self, number: int, *, step: int = 0, checkpoint: Path | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}")
        self.number, self.step, self.checkpoint = number, step, checkpoint

    @property
    def exit_code(self) -> int:
        """Return what a shell expects: 129 for SIGHUP, 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number


class StopFlag:
    """Whether someone asked this process to stop, and what to do about it.

    Attributes:
        number: the signal that came; None as long as none did.
        training: whether a step is under way, so that stopping can wait for it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.training = False
        self._at = 0.0
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def receive(self, number: int, _frame: FrameType | None = None) -> None:
        """Take a signal, as `signal.signal` calls it.

        Raises:
            Stopped: nothing is being trained, or this is the second wish.
        """
        if number == signal.SIGHUP:
            self._leave_terminals()
        first, repeat = self.number is None, time.monotonic() - self._at < SAME_WISH_SECONDS
        if first:
            self.number, self._at = number, time.monotonic()
        if not self.training or not (first or repeat):
            raise Stopped(number)

    def _leave_terminals(self) -> None:
        """Discard further output: writing to a closed terminal raises EIO."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Listen to Ctrl-C, SIGTERM and SIGHUP inside the block; restore the handlers after it.

    An ignored SIGHUP stays ignored, as nohup(1) requires.
    """
    flag = StopFlag()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, flag.receive) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""How long a child may go on: the time that it computes or sleeps, not that it waits for a CPU.

On a busy machine a proof of one second may take a minute of wall time and is right all the same;
one that spins or sleeps for a minute by itself hangs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# How often the child is looked at.
LOOK_EVERY_S = 0.1
# A look that comes later says nothing of the time before: this process was stopped or starved.
LONGEST_LOOK_S = 1.0
# States of threads in /proc/PID/stat that are no sleep: they have a CPU or wait for one, for the
# disk, or for whoever stopped them. Source: proc_pid_stat(5), man-pages 6.9 (2026-11-25).
_AWAKE = frozenset("RDTt")


class Usage(NamedTuple):
    """What a process and all that it started have done so far."""

    cpu_s: float
    asleep: bool


class Patience:
    """A clock that is set anew for each candidate.

    Args:
        pid: the child.
        limit_s: seconds of computing and sleeping that it may take.
        wall_s: seconds that it may take in all, the wait for a CPU included.
    """

    def __init__(self, pid: int, *, limit_s: float, wall_s: float) -> None:
        self.pid = pid
        self.restart(limit_s=limit_s, wall_s=wall_s)

    def restart(self, *, limit_s: float, wall_s: float) -> None:
        """Begin anew, with other limits."""
        self.limit_s, self.wall_s = limit_s, wall_s
        self.own_s = self.passed_s = 0.0
        self._looked = time.monotonic()
        self._cpu_s = usage_of(self.pid).cpu_s

    def spent(self) -> bool:
        """Look at the child, unless that was done just now; tell whether a limit is passed."""
        since = time.monotonic() - self._looked
        if since >= LOOK_EVERY_S:
            usage = usage_of(self.pid)
            since = min(since, LONGEST_LOOK_S)
            self.passed_s += since
            self.own_s += own_time(since, cpu_s=usage.cpu_s - self._cpu_s, asleep=usage.asleep)
            self._looked, self._cpu_s = time.monotonic(), usage.cpu_s
        return self.own_s >= self.limit_s or self.passed_s >= self.wall_s

    def sentence(self) -> str:
        """Say which limit was passed."""
        if self.own_s >= self.limit_s:
            return f"still running after {self.limit_s:g} s"
        return f"still running after {self.wall_s:g} s, {self.own_s:.0f} s of them with a CPU"


def own_time(since: float, *, cpu_s: float, asleep: bool) -> float:
    """Give how much of a stretch of time a process answers for itself.

    Args:
        since: seconds of wall time.
        cpu_s: seconds of CPU time in it, of all threads.
        asleep: whether none of its threads wanted a CPU at the end.
    """
    return since if asleep else min(since, max(cpu_s, 0.0))


def usage_of(pid: int) -> Usage:
    """Add up the CPU time of a process and its descendants, and see whether any is awake."""
    ticks, awake = 0, False
    for process in _tree(Path("/proc") / str(pid)):
        # What ends meanwhile has no files any more.
        with contextlib.suppress(OSError):
            fields = _fields(process)
            # utime, stime, and the same of the children that were waited for.
            ticks += sum(map(int, fields[11:15]))
            awake = awake or any(_fields(task)[0] in _AWAKE for task in process.glob("task/*"))
    return Usage(cpu_s=ticks / os.sysconf("SC_CLK_TCK"), asleep=not awake)


def _tree(process: Path) -> Iterator[Path]:
    yield process
    for listed in process.glob("task/*/children"):
        with contextlib.suppress(OSError):
            for pid in listed.read_text(encoding="ascii").split():
                yield from _tree(process.parent / pid)


def _fields(process: Path) -> list[str]:
    """Split a stat file behind the name, which may hold spaces and brackets: state comes first."""
    return (
        (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )

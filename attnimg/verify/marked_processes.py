"""Find the processes that a proof's child started, by a mark in their environment.

A process inherits the mark, also where it left the child's group and session.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "ATTNIMG_PROOF"


def processes_with(mark: str) -> Iterator[Path]:
    """Yield the folders in /proc of the processes that were started with a mark."""
    entry = f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        # The process may be another user's, or may have ended.
        with suppress(OSError):
            if entry in (process / "environ").read_bytes().split(b"\0"):
                yield process


def count_forks() -> int:
    """Return how many forks of this process run: other processes with its mark and command."""
    mark = os.environ.get(MARK)
    if mark is None:
        return 0
    own = Path("/proc/self/cmdline").read_bytes()
    found = 0
    for process in processes_with(mark):
        with suppress(OSError):
            alike = (process / "cmdline").read_bytes() == own
            found += alike and int(process.name) != os.getpid()
    return found

"""Find what a proof's child started: each process has its mark in the environment, daemons too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "ATTNIMG_PROOF"


def marked(mark: str) -> Iterator[Path]:
    """Yield the folders in /proc of the processes whose environment began with a mark."""
    entry = f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        # Another user's, or one that ended.
        with suppress(OSError):
            if entry in (process / "environ").read_bytes().split(b"\0"):
                yield process


def forks() -> int:
    """Count the processes that a kernel forked off this one, and that run the same program on."""
    mark = os.environ.get(MARK)
    if mark is None:
        return 0
    own = Path("/proc/self/cmdline").read_bytes()
    found = 0
    for process in marked(mark):
        with suppress(OSError):
            alike = (process / "cmdline").read_bytes() == own
            found += alike and int(process.name) != os.getpid()
    return found

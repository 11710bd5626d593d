#!/usr/bin/env python3
"""Run nvcc when one of a fixed number of slots is free: builds that run side by side share them.

    SLOTS=FOLDER SLOT_COUNT=N SLOT_RANK=R SLOT_NVCC=PATH compile_slot.py ARGUMENTS...

A slot is a locked file, so that a build that is killed frees its own. A smaller rank asks more
often and gets the next free slot: the kernel that is done first is usable first.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

# Line tables for a debugger; they double the size of FlashAttention-3's library.
LEFT_OUT = {"-lineinfo"}


def take_slot(folder: Path, count: int, *, rank: int) -> int:
    """Return the descriptor of a lock on a free slot, after waiting for one."""
    while True:
        for number in range(count):
            descriptor = os.open(folder / str(number), os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
            else:
                # The lock has to outlive this program, which becomes nvcc.
                os.set_inheritable(descriptor, True)
                return descriptor
        time.sleep(0.1 * (1 + 4 * rank))


def main() -> None:
    """Wait for a slot, then become nvcc."""
    arguments = [argument for argument in sys.argv[1:] if argument not in LEFT_OUT]
    # Questions like --version compile nothing.
    if "-c" in arguments or "--compile" in arguments:
        folder, count = Path(os.environ["SLOTS"]), int(os.environ["SLOT_COUNT"])
        take_slot(folder, count, rank=int(os.environ.get("SLOT_RANK", "0")))
        # What runs on the GPU meanwhile is timed.
        os.nice(5)
    os.execv(os.environ["SLOT_NVCC"], [os.environ["SLOT_NVCC"], *arguments])


if __name__ == "__main__":
    main()

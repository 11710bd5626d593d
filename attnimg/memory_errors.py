"""Turn out-of-memory errors of Python, torch and the operating system into an AttnimgError."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from attnimg.errors import AttnimgError

# Source: torch 2.13, c10/core/impl/alloc_cpu.cpp ("DefaultCPUAllocator: can't allocate memory",
# "not enough memory"); glibc ("Cannot allocate memory", "failed to map segment") (2026-11-27).
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|failed to map segment"
    r"|std::bad_alloc|cannot create thread|can't start new thread",
    re.IGNORECASE,
)
# Source: torch 2.13, torch/utils/data/_utils/signal_handling.py ("DataLoader worker (pid 7) is
# killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory"),
# dataloader.py ("exited unexpectedly"), aten/src/ATen/MapAllocator.cpp ("unable to write to file
# </torch_7_8_0>: No space left on device", "unable to mmap", "unable to resize") (2026-11-27).
_SHARED = re.compile(
    r"bus error|out of shared memory|(unable to|could not) \w+ .*(</torch_|shared memory)"
    r"|shared memory (file|object)",
    re.IGNORECASE,
)
_WORKER = re.compile(r"DataLoader worker.* (killed by signal|exited unexpectedly)")

# With less free space, /dev/shm counts as full.
_FULL_BELOW_BYTES = 64 << 10

_LESS = (
    "set micro_batch_size and sequence_len lower, set gradient_checkpointing: true, or run it "
    "where more memory is free"
)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise an AttnimgError instead of an out-of-memory error of the block.

    Raises:
        AttnimgError: code out-of-memory, exit code 1.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if (found := as_refusal(error)) is None:
            raise
        raise found from error


def as_refusal(error: BaseException) -> AttnimgError | None:
    """Return the AttnimgError for an out-of-memory error; None for any other error."""
    from concurrent.futures.process import BrokenProcessPool

    lines = str(error).splitlines() or [type(error).__name__]
    matching = [line for line in lines if any(p.search(line) for p in (_SHARED, _WORKER, _MEMORY))]
    said = (matching or lines)[-1].strip()
    if isinstance(error, BrokenProcessPool):
        return _error("a process that prepares data was killed", said, "set dataset_num_proc: 1",
                      key="dataset_num_proc")  # fmt: skip
    # The error of a semaphore that does not fit into /dev/shm has no file name.
    semaphore = isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename
    if (semaphore and _shared_free() < _FULL_BELOW_BYTES) or (
        not isinstance(error, OSError) and _SHARED.search(said)
    ):
        return _error(
            "shared memory (/dev/shm) is full", f"{said}\n{_shared_text()}",
            "set dataloader_num_workers: 0, or start the container with --shm-size=1g",
            key="dataloader_num_workers",
        )  # fmt: skip
    if _WORKER.search(said):
        return _error("a process that loads data was killed", f"{said}\n{_memory_text()}",
                      "set dataloader_num_workers: 0", key="dataloader_num_workers")  # fmt: skip
    full = isinstance(error, MemoryError) or (
        matching if not isinstance(error, OSError) else error.errno == errno.ENOMEM
    )
    return _error("out of memory", f"{said}\n{_memory_text()}", _LESS, key=None) if full else None


def _error(what: str, why: str, do: str, *, key: str | None) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="out-of-memory", key=key, exit_code=1)


def _memory_text() -> str:
    """Return how much memory is free, and the limits that this process has."""
    found = []
    with suppress(OSError, ImportError, MemoryError):
        import psutil

        found.append(f"{psutil.virtual_memory().available >> 20:,} MiB are free on this machine")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(f"ulimit -v allows this process {limit >> 20:,} MiB")
    with suppress(OSError, ValueError):  # "max" without a limit
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        found.append(f"the container may use {most >> 20:,} MiB")
    return "; ".join(found) or "the amount of free memory is not known"


def _shared_text() -> str:
    found = os.statvfs("/dev/shm")
    return f"/dev/shm has {found.f_blocks * found.f_frsize / 2**20:,.1f} MiB"


def _shared_free() -> int:
    """Return the bytes that are free in /dev/shm; 0 where there is none."""
    with suppress(OSError):
        left = os.statvfs("/dev/shm")
        return left.f_bavail * left.f_frsize
    return 0

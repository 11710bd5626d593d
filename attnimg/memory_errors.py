"""Convert out-of-memory errors of Python, torch and the operating system into an AttnimgError."""

from __future__ import annotations

import errno
import re
import resource
import shutil
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

_SHM = Path("/dev/shm")
# With less free space, it counts as full.
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
        what, do = "a process that prepares data was killed", "set dataset_num_proc: 1"
        return _error(what, said, do, key="dataset_num_proc")
    if _is_shm_full(error, said):
        why = f"{said}\n/dev/shm has {shutil.disk_usage(_SHM).total / 2**20:,.1f} MiB"
        do = "set dataloader_num_workers: 0, or start the container with --shm-size=1g"
        return _error("shared memory (/dev/shm) is full", why, do, key="dataloader_num_workers")
    if _WORKER.search(said):
        what, do = "a process that loads data was killed", "set dataloader_num_workers: 0"
        return _error(what, f"{said}\n{_memory_text()}", do, key="dataloader_num_workers")
    full = error.errno == errno.ENOMEM if isinstance(error, OSError) else matching
    if full or isinstance(error, MemoryError):
        return _error("out of memory", f"{said}\n{_memory_text()}", _LESS, key=None)
    return None


def _is_shm_full(error: BaseException, said: str) -> bool:
    if not isinstance(error, OSError):
        return _SHARED.search(said) is not None
    # The error of a semaphore that does not fit into /dev/shm has no file name.
    semaphore = error.errno == errno.ENOSPC and not error.filename
    return semaphore and _SHM.is_dir() and shutil.disk_usage(_SHM).free < _FULL_BELOW_BYTES


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

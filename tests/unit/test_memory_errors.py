"""Test that each out-of-memory error becomes an AttnimgError, and that other errors do not."""

from __future__ import annotations

import errno
from concurrent.futures.process import BrokenProcessPool

import pytest

from attnimg.errors import AttnimgError, memory_errors, out_of_memory_error

FULL = {
    "Python": (MemoryError(), "out of memory"),
    "torch": (
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 54975 bytes. Error code 12"),
        "out of memory"),
    "a fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory"),
    "a library that is loaded": (
        ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory"),
    "a thread": (RuntimeError("can't start new thread"), "out of memory"),
    "shared memory": (
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\n"
                     "RuntimeError: unable to write to file </torch_7_8_0>: No space left on "
                     "device (28)"), "/dev/shm"),
    "a worker's bus error": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible "
                     "that dataloader's workers are out of shared memory."), "/dev/shm"),
    "a worker that the kernel kills": (
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        "a DataLoader worker was killed"),
    "workers that end": (
        RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"),
        "a DataLoader worker was killed"),
    "a process of the data's preparation": (
        BrokenProcessPool("A process in the process pool was terminated abruptly"), "prepares"),
}  # fmt: skip
OTHER = {
    "a shape": RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
    "a full disk": OSError(errno.ENOSPC, "No space left on device"),
    "a package": ImportError("No module named 'flash_attn'"),
    "a missing file": FileNotFoundError(errno.ENOENT, "No such file or directory"),
}


@pytest.mark.parametrize(("error", "says"), FULL.values(), ids=FULL)
def test_each_out_of_memory_error_is_reported_with_advice(error: Exception, says: str) -> None:
    with pytest.raises(AttnimgError, match=says) as caught, memory_errors():
        raise error
    assert (caught.value.code, caught.value.exit_code) == ("out-of-memory", 1)
    assert "MiB" in caught.value.why or "pool" in caught.value.why
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", OTHER.values(), ids=OTHER)
def test_other_errors_are_not_changed(error: Exception) -> None:
    assert out_of_memory_error(error) is None
    with pytest.raises(type(error)) as caught, memory_errors():
        raise error
    assert caught.value is error

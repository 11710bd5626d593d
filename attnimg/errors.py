"""Define AttnimgError, the exception that is shown to users: what happened, why, what to do."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

from attnimg.redact import redact

# Control characters of ASCII and Latin-1, and bidirectional ones, which reorder text.
# Source: Unicode 17, categories Cc and Cf (Bidi_Control), less tab and newline (2026-11-27).
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)

# Longer parts of a message would fill the screen.
_LONGEST_PART = 4000


def printable(text: str) -> str:
    """Return text that is safe to print on a terminal: its control characters are escaped.

    Args:
        text: from an external source, such as a path, a config key or a library's message. Tabs
            and newlines are kept.
    """
    return CONTROL_CHARACTERS.sub(lambda found: ascii(found.group())[1:-1], text)


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: "1 document", "2 documents", "1,234 documents".

    Args:
        count: how many.
        noun: what is counted, in the singular.
        plural: for a noun that does not only get an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def shortened(text: str) -> str:
    """Return text cut to 4,000 characters, followed by the number of characters left out."""
    if len(text) <= _LONGEST_PART:
        return text
    return f"{text[:_LONGEST_PART]} ... ({len(text) - _LONGEST_PART:,} more characters)"


class AttnimgError(Exception):
    """An error that a user can fix: in their input, their machine, or a kernel that failed.

    Args:
        what: what happened, one line, no full stop.
        why: what was found and what is needed; may have several lines.
        do: the fix, as a command or a config line where there is one.
        code: the error code, such as "packing-not-isolated".
        key: the config key at fault, such as "datasets[0].path".
        exit_code: 2 for an error that is found before the run, 1 when the run itself failed.
    """

    default_key: ClassVar[str | None] = None

    def __init__(
        self,
        what: str,
        *,
        why: str,
        do: str,
        code: str = "error",
        key: str | None = None,
        exit_code: int = 2,
    ) -> None:
        super().__init__(what)
        self.what, self.why, self.do = what, why, do
        self.code, self.key, self.exit_code = code, key or self.default_key, exit_code

    def __reduce__(self) -> tuple[object, ...]:
        """Return how to pickle it with its keywords, so that a parent process can raise it."""
        rest = {name: getattr(self, name) for name in ("why", "do", "code", "key", "exit_code")}
        return partial(type(self), **rest), (self.what,)

    def __str__(self) -> str:
        """Return what, why and do, aligned, without secrets and safe to print on a terminal."""
        parts = [f"attnimg: {printable(shortened(redact(self.what)))}"]
        for label, text in (("why", self.why), ("do", self.do)):
            first, *rest = printable(shortened(redact(text))).splitlines() or [""]
            parts.append(f"  {label + ':':<4} {first}")
            parts.extend(f"       {line}" for line in rest)
        return "\n".join(parts)


class KernelError(AttnimgError):
    """A kernel failed its proof, or no kernel may be used for the requested backend."""

    default_key: ClassVar[str] = "attn_implementation"


class PackingLeak(AttnimgError):
    """Packed documents affect one another in a model, or the model raised on packed documents."""


def bad_value(key: str, what: str, *, why: str, do: str) -> AttnimgError:
    """Return the error for a config key whose value can't be used."""
    return AttnimgError(what, why=why, do=do, code="bad-value", key=key)


def set_backend(name: str) -> str:
    """Return the advice to use another attention backend: the config line that selects it."""
    return f"set {KernelError.default_key}: {name}"


def bad_manifest(path: Path, error: Exception) -> AttnimgError:
    """Return the error for an unreadable file that was written when the image was built."""
    return AttnimgError(
        f"{path} cannot be read",
        why=f"{type(error).__name__}: {error}; needed the file that the image build writes",
        do="pull the image again",
        code="bad-image",
        exit_code=1,
    )


# Characters of a message that are kept at its beginning and end. Some messages name the call first
# and the cause last: xFormers lists its kernels with the reasons against each.
BEGINNING, ENDING = 250, 350


def exception_text(error: BaseException) -> str:
    """Return the type and the message of an exception, without the middle of a long message."""
    if isinstance(error, AttnimgError):
        return f"{error.what}: {' '.join(error.why.split())}"
    return f"{type(error).__name__}: {without_middle(' '.join(str(error).split()))}"


def without_middle(text: str) -> str:
    """Return the beginning and the end of a long text."""
    if len(text) <= BEGINNING + ENDING:
        return text
    return f"{text[:BEGINNING]} ... {text[-ENDING:]}"


def signal_name(number: int) -> str:
    """Return a signal's name, or its number if it has no name, as real-time signals."""
    import signal  # not at each start of attnimg: it makes enums of the system's constants

    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# Source: torch 2.13, c10/core/impl/alloc_cpu.cpp ("DefaultCPUAllocator: can't allocate memory",
# "not enough memory"); glibc ("Cannot allocate memory", "failed to map segment") (2026-11-27).
_MEMORY = (
    r"can't allocate memory|not enough memory|cannot allocate memory|failed to map segment"
    r"|std::bad_alloc|cannot create thread|can't start new thread"
)

# Source: torch 2.13, torch/utils/data/_utils/signal_handling.py ("DataLoader worker (pid 7) is
# killed by signal: Bus error. It is possible that dataloader's workers are out of shared memory"),
# dataloader.py ("exited unexpectedly"), aten/src/ATen/MapAllocator.cpp ("unable to write to file
# </torch_7_8_0>: No space left on device", "unable to mmap", "unable to resize") (2026-11-27).
_SHARED_MEMORY = (
    r"bus error|out of shared memory|(unable to|could not) \w+ .*(</torch_|shared memory)"
    r"|shared memory (file|object)"
)

_WORKER = r"DataLoader worker.* (killed by signal|exited unexpectedly)"

_SHM = Path("/dev/shm")

# /dev/shm counts as full when it has less free space.
_FULL_BELOW_BYTES = 64 << 10

_USE_LESS_MEMORY = (
    "lower micro_batch_size or sequence_len, set gradient_checkpointing: true, or use a machine "
    "with more free memory"
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
        if (found := out_of_memory_error(error)) is None:
            raise
        raise found from error


def out_of_memory_error(error: BaseException) -> AttnimgError | None:
    """Return the AttnimgError for an out-of-memory error; None for any other error."""
    from concurrent.futures.process import BrokenProcessPool

    lines = str(error).splitlines() or [type(error).__name__]
    known = "|".join((_SHARED_MEMORY, _WORKER, _MEMORY))
    matching = [line for line in lines if _is_about(known, line)]
    message = (matching or lines)[-1].strip()
    if isinstance(error, BrokenProcessPool):
        what, do = "a process that prepares the dataset was killed", "set dataset_num_proc: 1"
        return _error(what, message, do, key="dataset_num_proc")
    if _is_shm_full(error, message):
        why = f"{message}\n/dev/shm has {shutil.disk_usage(_SHM).total / 2**20:,.1f} MiB"
        do = "set dataloader_num_workers: 0, or start the container with --shm-size=1g"
        return _error("shared memory (/dev/shm) is full", why, do, key="dataloader_num_workers")
    if _is_about(_WORKER, message):
        what, do = "a DataLoader worker was killed", "set dataloader_num_workers: 0"
        return _error(what, f"{message}\n{_memory_text()}", do, key="dataloader_num_workers")
    full = error.errno == errno.ENOMEM if isinstance(error, OSError) else matching
    if full or isinstance(error, MemoryError):
        return _error("out of memory", f"{message}\n{_memory_text()}", _USE_LESS_MEMORY, key=None)
    return None


def _is_shm_full(error: BaseException, message: str) -> bool:
    if not isinstance(error, OSError):
        return _is_about(_SHARED_MEMORY, message)
    # The error of a semaphore that does not fit into /dev/shm has no file name.
    semaphore = error.errno == errno.ENOSPC and not error.filename
    return semaphore and _SHM.is_dir() and shutil.disk_usage(_SHM).free < _FULL_BELOW_BYTES


def _is_about(pattern: str, message: str) -> bool:
    """Return whether a message matches a pattern; compiling them at each start takes 1.5 ms."""
    return re.search(pattern, message, re.IGNORECASE) is not None


def _error(what: str, why: str, do: str, *, key: str | None) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="out-of-memory", key=key, exit_code=1)


def _memory_text() -> str:
    """Return how much memory is free, and the memory limits of this process."""
    found = []
    with suppress(OSError, ImportError, MemoryError):
        import psutil

        found.append(f"{psutil.virtual_memory().available >> 20:,} MiB are free on this machine")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(f"ulimit -v allows this process {limit >> 20:,} MiB")
    with suppress(ImportError, MemoryError):
        from attnimg.cgroup import memory_limit

        if (most := memory_limit()) is not None:
            found.append(f"the container or job may use {most >> 20:,} MiB")
    return "; ".join(found) or "the amount of free memory is unknown"

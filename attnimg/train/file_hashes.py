"""Write, hash and flush the files of a checkpoint: a file's hash is taken while it is written."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from attnimg.threads import executor

THREADS = 4
# The threads that hash leave the cores to the one that writes, and then trains.
_NICE = 10
# What is read at a time: it stays in a core's cache until it is hashed.
_BLOCK_BYTES = 2**20
# Memory that may wait to be hashed, because a GPU's tensors are copied to the CPU for it.
_WAITING_BYTES = 4 * 2**30


class FileHashes:
    """SHA-256 of files, taken in threads beside those that flush; a context manager ends them."""

    def __init__(self) -> None:
        # A core is left to the thread that writes: what it writes late is on the disk late.
        spare = max(1, len(os.sched_getaffinity(0)) - 1)
        self._memory = executor(min(spare, THREADS), nice=_NICE)
        self._read, self._flush = executor(THREADS, nice=_NICE), executor(THREADS)
        self._files: dict[Path, tuple[tuple[int, ...] | None, Future[str], Future[None]]] = {}
        self._waiting: deque[tuple[Future[str], int]] = deque()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Wait for what is under way, and drop the rest."""
        for pool in (self._memory, self._read, self._flush):
            pool.shutdown(cancel_futures=True)

    def write(self, path: Path, content: Sequence[memoryview]) -> None:
        """Write a file while a thread hashes the same memory, and begin to flush it.

        The content must stay as it is until `settle` returns. The hash is that of the content,
        whatever happens to the file.
        """
        hashing = self._memory.submit(_hash_of, content)
        with path.open("wb") as file:
            file.writelines(content)
        self._files[path] = None, hashing, self._flush.submit(flush, path)
        self._waiting.append((hashing, sum(part.nbytes for part in content)))
        while sum(size for _, size in self._waiting) > _WAITING_BYTES:
            self._waiting.popleft()[0].result()

    def add(self, path: Path) -> None:
        """Begin to hash and flush a file that is written."""
        hashing = self._read.submit(_hash, path)
        self._files[path] = _identity(path), hashing, self._flush.submit(flush, path)

    def settle(self) -> None:
        """Wait until all that was written from memory is hashed."""
        for hashing, _ in self._waiting:
            with suppress(CancelledError):  # closed, because a file could not be written
                hashing.result()
        self._waiting.clear()

    def of(self, paths: list[Path]) -> list[str]:
        """Return the hashes of files, when all are on the disk.

        A file that was changed since `add` is hashed again.

        Raises:
            OSError: a file could not be written to the disk.
        """
        for path in paths:
            if path not in self._files or self._files[path][0] not in (None, _identity(path)):
                self.add(path)
        for path in paths:
            self._files[path][2].result()
        return [self._files[path][1].result() for path in paths]


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(file: IO[Any]) -> str:
    """Return the SHA-256 of a file that is open for unbuffered reading."""
    found, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    while count := file.readinto(block):  # type: ignore[attr-defined]  # of raw files
        found.update(view[:count])
    return found.hexdigest()


def _hash_of(content: Sequence[memoryview]) -> str:
    found = hashlib.sha256()
    for part in content:
        found.update(part)
    return found.hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return sha256_of(file)


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns

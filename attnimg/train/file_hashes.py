"""Hash the files of a checkpoint and flush them, each while the next ones are written."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self

_THREADS = 4
# Reading and hashing release the GIL for this many bytes at a time: the thread that writes the
# next file needs it, too.
_BLOCK_BYTES = 16 * 2**20


class FileHashes:
    """SHA-256 of files, taken in threads that also flush them; a context manager that ends them."""

    def __init__(self) -> None:
        self._pools = ThreadPoolExecutor(_THREADS), ThreadPoolExecutor(_THREADS)
        self._files: dict[Path, tuple[tuple[int, ...], Future[str], Future[None]]] = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for what is under way, and drop the rest."""
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def add(self, path: Path) -> None:
        """Begin to hash and flush a file that is written."""
        hashing, flushing = self._pools
        self._files[path] = (
            _identity(path),
            hashing.submit(_hash, path),
            flushing.submit(flush, path),
        )

    def of(self, paths: list[Path]) -> list[str]:
        """Return the hashes of files, when all are on the disk; one written since is done again.

        Raises:
            OSError: a file could not be written to the disk.
        """
        for path in paths:
            if path not in self._files or self._files[path][0] != _identity(path):
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


def _hash(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return sha256_of(file)


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns

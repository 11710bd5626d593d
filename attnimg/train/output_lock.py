"""Lock output_dir against a second run. The lock is released when the process ends in any way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnimg.errors import AttnimgError

FILE = ".lock"


def require_unlocked(folder: Path) -> None:
    """Raise when another process trains in a folder; the lock is not taken.

    Raises:
        AttnimgError: code output-dir-busy.
    """
    if (folder / FILE).is_file():
        os.close(_locked(folder))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock inside the block.

    Raises:
        AttnimgError: another process trains there (code output-dir-busy).
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = _locked(folder)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(handle)


def _locked(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(folder / FILE, flags, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return handle  # some network file systems have no locks
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        raise AttnimgError(
            f"another run trains in output_dir {folder}",
            why=f"found {folder / FILE}, locked by {owner or 'a process that is starting'}\n"
            "needed: a folder that no running process writes to",
            do="set another output_dir, or wait until that run has ended",
            code="output-dir-busy",
            key="output_dir",
        ) from None
    return handle

"""Read files that are regular and not too long; keep files that no other user may have written.

What is kept from one run to the next is believed later, so it must come from the same user: a
regular file (no link, pipe or device) of this user's own, in a folder of this user's own, that
neither group nor others may write.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path


class NotPrivate(OSError):
    """Why a file or folder is not read, in words: "it belongs to user 1001"."""


def read_regular(path: Path, *, at_most: int) -> bytes:
    """Return the content of a regular file, or of a link to one.

    Args:
        path: what a user named; a pipe, socket or device may never end, and is refused.
        at_most: bytes; a longer file is refused after that many.

    Raises:
        OSError: in strerror, why it can't be read: it is missing, too long, or no regular file.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe, a socket, a device or a folder")
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it is longer than {at_most:,} bytes")
    return content


def make_private_folder(path: Path) -> None:
    """Create a folder that this user alone may write, or check the one that is there.

    Raises:
        NotPrivate: the folder is another user's, a link, or may be written by others.
        OSError: it can't be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        check_private(path.lstat(), is_kind=stat.S_ISDIR)


def read_private(path: Path, *, at_most: int) -> bytes:
    """Return the content of a file, after checking whose it is.

    Args:
        path: a file in a folder made by make_private_folder.
        at_most: bytes; a longer file is refused.

    Raises:
        FileNotFoundError: there is no such file.
        NotPrivate: the file or its folder may hold what another user wrote, or is too long.
        OSError: it can't be read.
    """
    check_private(path.parent.lstat(), is_kind=stat.S_ISDIR)
    # O_NONBLOCK: opening a pipe would wait for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        check_private(found, is_kind=stat.S_ISREG)
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise NotPrivate(f"it is longer than {at_most} bytes")
    return content


def write_private(path: Path, content: bytes) -> None:
    """Write a file with mode 0600 whole or not at all, in a folder of this user's own.

    Raises:
        NotPrivate: the folder is not this user's own.
        OSError: it can't be written.
    """
    make_private_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_private(found: os.stat_result, *, is_kind: Callable[[int], bool]) -> None:
    """Raise unless what lstat or fstat found is of a kind, and this user's own to write.

    Raises:
        NotPrivate: in words that follow the path.
    """
    if not is_kind(found.st_mode):
        raise NotPrivate("it is not a regular file or folder")
    if found.st_uid != os.geteuid():
        raise NotPrivate(f"it belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivate("other users may write it")

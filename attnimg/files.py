"""Read attnimg's own data, regular files up to a size, and files that only this user can change.

A run trusts the files that earlier runs stored. Each must therefore be a regular file (no link,
pipe or device) that belongs to this user, in a folder that belongs to this user, and neither may be
writable by the group or by others.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
import tomllib
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any


class NotPrivate(OSError):
    """Raised for a file or folder that others can change; the message is the reason."""


def data_file(name: str) -> Path:
    """Return the path of a file in attnimg/data; pip installs the package unzipped."""
    return Path(__file__).parent / "data" / name


def read_data(name: str) -> dict[str, Any]:
    """Read a TOML file of attnimg/data."""
    return tomllib.loads(data_file(name).read_text("utf-8"))


def read_regular(path: Path, *, at_most: int) -> bytes:
    """Return the content of a regular file, or of a link to one.

    Args:
        path: from the user. Pipes, sockets and devices, which may never end, are refused.
        at_most: bytes; longer files are refused.

    Raises:
        OSError: the file is missing, too long or not regular; strerror has the reason.
    """
    with open_regular(path) as file:
        content = file.read(at_most + 1)
    if len(content) > at_most:
        raise OSError(errno.EFBIG, f"it is longer than {at_most:,} bytes")
    return content


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: the file is missing or not regular; strerror has the reason.
    """
    # O_NONBLOCK: opening a pipe would wait for its writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe, a socket, a device or a folder")
    return file


def make_private_folder(path: Path) -> None:
    """Create a folder that only this user can write to, or check an existing one.

    Raises:
        NotPrivate: the folder belongs to another user, is a link, or is writable by others.
        OSError: it can't be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        check_private(path.lstat(), is_kind=stat.S_ISDIR)


def read_private(path: Path, *, at_most: int) -> bytes:
    """Return the content of a file, after checking that only this user can change it.

    Args:
        path: a file in a folder made by make_private_folder.
        at_most: bytes; a longer file is refused.

    Raises:
        FileNotFoundError: there is no such file.
        NotPrivate: another user can change the file or its folder, or the file is too long.
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
    """Write a file atomically with mode 0600, in a folder that only this user can write to.

    Raises:
        NotPrivate: others can write to the folder.
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
    """Raise unless a file is of the expected kind and only this user can write to it.

    Raises:
        NotPrivate: with the reason, in words that can follow the path.
    """
    if not is_kind(found.st_mode):
        raise NotPrivate("it is not a regular file or folder")
    if found.st_uid != os.geteuid():
        raise NotPrivate(f"it belongs to user {found.st_uid}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotPrivate("other users may write to it")

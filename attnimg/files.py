"""Read, write and hash files: attnimg's own, the user's, and those that only this user can change.

A run trusts the files that earlier runs stored. Each must therefore be a regular file (no link,
pipe or device) that belongs to this user, in a folder that belongs to this user, and neither may be
writable by the group or by others. Such a file also caches the hashes of large files. A cached hash
is used only while the device, inode, size, mtime and ctime of the file are the same: the operating
system sets ctime at each change of content or metadata, and no program can set it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attnimg.distributions import distribution

if TYPE_CHECKING:
    from concurrent.futures import Executor

# Smaller files are hashed each time, which is faster than looking up their hash.
_CACHED_BYTES = 1 << 20

# A file that changed less than this ago may change again and keep its ctime: timestamps have a
# resolution of a few milliseconds, on some network file systems of a second.
_SETTLED_S = 2.0

_CACHE_FILE = "hashes.json"

_CACHE_FILE_BYTES = 4 << 20

_THREADS = 4

T = TypeVar("T")
R = TypeVar("R")


class NotPrivate(OSError):
    """Raised for a file or folder that others can change; the message is the reason."""


def data_file(name: str) -> Path:
    """Return the path of a file in attnimg/data; pip installs the package unzipped."""
    return Path(__file__).parent / "data" / name


def read_data(name: str) -> dict[str, Any]:
    """Read a TOML file of attnimg/data."""
    import tomllib

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


def write_checked(path: Path, content: object) -> None:
    """Write JSON with its own hash, as write_private does."""
    text = json.dumps(content)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_private(path, json.dumps({"sha256": digest, "content": text}).encode())


def read_checked(path: Path, *, at_most: int) -> Any:
    """Return what write_checked wrote; the hash finds any change of it, but is not a signature.

    Raises:
        OSError: as read_private.
        ValueError, TypeError, KeyError, AttributeError, RecursionError: it was changed.
    """
    stored = json.loads(read_private(path, at_most=at_most))
    if hashlib.sha256(stored["content"].encode()).hexdigest() != stored["sha256"]:
        raise ValueError("its own hash differs")
    return json.loads(stored["content"])


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


def cache_folder(environment: Mapping[str, str], name: str = "proofs") -> Path:
    """Return this user's cache folder of the given name.

    It is below ATTNIMG_CACHE, or else below the user's cache folder. Its name contains the uid, so
    that users who share ATTNIMG_CACHE, such as an image's /cache, have one each.
    """
    own = f"{name}-{os.geteuid()}"
    if named := environment.get("ATTNIMG_CACHE"):
        return Path(named) / own
    from platformdirs import user_cache_path

    return user_cache_path("attnimg") / own


class CachedHasher:
    """Hash files, with a cache of the hashes of large ones.

    Args:
        folder: where the cache is; None for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known = _read_cache(folder) if folder else {}
        self._new: dict[str, str] = {}

    def hash_each(self, files: Iterable[Path]) -> list[str]:
        """Return the SHA-256 of each file.

        Raises:
            OSError: a file can't be read.
        """
        return map_in_threads(self._hash_file, files)

    def hash_files(self, root: Path, files: Iterable[Path]) -> str:
        """Return one hash of the names and the content of files.

        Args:
            root: the folder that their names are relative to.
            files: regular files.

        Raises:
            OSError: a file can't be read.
        """
        paths = sorted(files)
        listed = [
            (os.path.relpath(path, root), found)
            for path, found in zip(paths, self.hash_each(paths), strict=True)
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def hash_folder(self, folder: Path) -> str:
        """Return one hash of all files below a folder except __pycache__.

        Raises:
            OSError: a file can't be read.
        """
        return self.hash_files(folder, filter(_is_hashed, folder.rglob("*")))

    def hash_package(self, name: str) -> str | None:
        """Return one hash of a distribution's files; "" when it is not installed.

        Returns:
            None when the distribution has no list of its files, as some that pip did not install.

        Raises:
            OSError: a file can't be read.
        """
        try:
            found = distribution(name)
        except metadata.PackageNotFoundError:
            return ""
        if found.files is None:
            return None
        paths = (Path(str(file.locate())) for file in found.files)
        return self.hash_files(Path(str(found.locate_file(""))), filter(_is_hashed, paths))

    def hash_module(self, name: str) -> str:
        """Return one hash of the files of a top-level module, installed or editable.

        Raises:
            OSError: its files are not known, or can't be read.
        """
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"the files of the module {name} are not known")
        origin = Path(spec.origin)
        if spec.submodule_search_locations is None:
            return self.hash_files(origin.parent, [origin])
        return self.hash_folder(origin.parent)

    def hash_torch(self) -> str:
        """Return one hash of torch's compiled libraries: 0.5 GB on a CPU, 2 GB with CUDA."""
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        folder = Path(spec.origin).parent
        return self.hash_files(
            folder, (path for path in folder.glob("lib/*.so*") if path.is_file())
        )

    def save(self) -> None:
        """Write the hashes of large files to the cache, unless its folder is not writable."""
        if self.folder is None or not self._new:
            return
        merged = _read_cache(self.folder) | self._new
        with suppress(OSError):
            write_checked(self.folder / _CACHE_FILE, merged)
        self._new = {}

    def _hash_file(self, path: Path) -> str:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            large = before.st_size >= _CACHED_BYTES
            name = _identity(before)
            if large and (known := self._known.get(name)):
                return known
            found = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED_S
        if large and settled and _identity(after) == name:
            self._new[name] = self._known[name] = found
        return found


def _is_hashed(path: Path) -> bool:
    """Return whether a path is a file outside __pycache__."""
    return path.parent.name != "__pycache__" and path.is_file()


def _identity(found: os.stat_result) -> str:
    """Return the key of a file's cached hash."""
    identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ":".join(map(str, identity))


def _read_cache(folder: Path) -> dict[str, str]:
    """Read the cached hashes; return none if the file is missing, damaged or another user's."""
    try:
        cached = read_checked(folder / _CACHE_FILE, at_most=_CACHE_FILE_BYTES)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    if not isinstance(cached, dict):
        return {}
    return {name: found for name, found in cached.items() if isinstance(found, str)}


def map_in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the function's result for each item, in order.

    Args:
        function: spends most of its time without the GIL, as reading and hashing do.
        items: its argument in each call.
    """
    from concurrent.futures import ThreadPoolExecutor

    items = list(items)
    if not _memory_is_limited():
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(function, items))
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
    return [function(item) for item in items]


def thread_pool(threads: int) -> Executor:
    """Return a thread pool; where threads can't start, an executor that runs each call at once."""
    # Imported here: `attnimg check` needs none of them, and they take 7 ms of CPU time.
    from concurrent.futures import Executor, Future, ThreadPoolExecutor

    class ImmediateExecutor(Executor):
        def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
            future = Future[R]()
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:  # raised by Future.result, as in a thread pool
                future.set_exception(error)
            return future

    if _memory_is_limited():
        return ImmediateExecutor()
    return ThreadPoolExecutor(threads)


def _memory_is_limited() -> bool:
    """Return whether `ulimit -v` is set.

    With such a limit a new thread may fail before it reports that it has started;
    threading.Thread.start() then never returns.
    Source: CPython 3.11, Lib/threading.py, Thread.start, self._started.wait() (2026-11-27).
    """
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY

"""Hash the files of kernels and models that a result depends on; cache the hashes of large files.

A cached hash is used only while the device, inode, size, mtime and ctime of the file are the same:
the operating system sets ctime at each change of content or metadata, and no program can set it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from attnimg.files import read_private, write_private

# Smaller files are hashed each time, which is faster than looking up their hash.
_CACHED_BYTES = 1 << 20

# A file that changed less than this ago may change again and keep its ctime: timestamps have a
# resolution of a few milliseconds, on some network file systems of a second.
_SETTLED_S = 2.0

_FILE = "hashes.json"

_FILE_BYTES = 4 << 20


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


class ContentHashes:
    """Hash files, with a cache of the hashes of large ones.

    Args:
        folder: where the cache is; None for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known = _load(folder) if folder else {}
        self._new: dict[str, str] = {}

    def of_each(self, files: Iterable[Path]) -> list[str]:
        """Return the SHA-256 of each file.

        Raises:
            OSError: a file can't be read.
        """
        return in_threads(self._of_file, files)

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
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
            for path, found in zip(paths, self.of_each(paths), strict=True)
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def of_folder(self, folder: Path) -> str:
        """Return one hash of all files below a folder except __pycache__.

        Raises:
            OSError: a file can't be read.
        """
        return self.of_files(folder, filter(_computes, folder.rglob("*")))

    def of_package(self, name: str) -> str | None:
        """Return one hash of a distribution's files; "" when it is not installed.

        Returns:
            None when the distribution has no list of its files, as some that pip did not install.

        Raises:
            OSError: a file can't be read.
        """
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return ""
        if found.files is None:
            return None
        paths = (Path(str(file.locate())) for file in found.files)
        return self.of_files(Path(str(found.locate_file(""))), filter(_computes, paths))

    def of_module(self, name: str) -> str:
        """Return one hash of the files of a top-level module, installed or editable.

        Raises:
            OSError: its files are not known, or can't be read.
        """
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"the files of the module {name} are not known")
        origin = Path(spec.origin)
        if spec.submodule_search_locations is None:
            return self.of_files(origin.parent, [origin])
        return self.of_folder(origin.parent)

    def of_torch(self) -> str:
        """Return one hash of torch's compiled libraries: 0.5 GB on a CPU, 2 GB with CUDA."""
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        folder = Path(spec.origin).parent
        return self.of_files(folder, (path for path in folder.glob("lib/*.so*") if path.is_file()))

    def save(self) -> None:
        """Write the hashes of large files to the cache, unless its folder is not writable."""
        if self.folder is None or not self._new:
            return
        merged = _load(self.folder) | self._new
        with suppress(OSError):
            write_private(self.folder / _FILE, json.dumps(merged).encode())
        self._new = {}

    def _of_file(self, path: Path) -> str:
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            large = before.st_size >= _CACHED_BYTES
            name = _identity_of(before)
            if large and (known := self._known.get(name)):
                return known
            found = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(file.fileno())
        settled = time.time() - max(after.st_mtime, after.st_ctime) > _SETTLED_S
        if large and settled and _identity_of(after) == name:
            self._new[name] = self._known[name] = found
        return found


def _computes(path: Path) -> bool:
    """Return whether a path is a file outside __pycache__."""
    return path.parent.name != "__pycache__" and path.is_file()


def _identity_of(found: os.stat_result) -> str:
    """Return the key of a file's cached hash."""
    identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ":".join(map(str, identity))


def _load(folder: Path) -> dict[str, str]:
    """Read the cached hashes; return none if the file is missing, damaged or another user's."""
    try:
        kept = json.loads(read_private(folder / _FILE, at_most=_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {name: found for name, found in kept.items() if isinstance(found, str)}


_THREADS = 4

T = TypeVar("T")

R = TypeVar("R")


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the function's result for each item, in order.

    Args:
        function: spends most of its time without the GIL, as reading and hashing do.
        items: its argument in each call.
    """
    items = list(items)
    if not _limited():
        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(function, items))
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
    return [function(item) for item in items]


def executor(threads: int, *, nice: int = 0) -> Executor:
    """Return a thread pool; where threads can't start, an executor that runs each call at once.

    Args:
        threads: the maximum number of threads.
        nice: added to their nice value, such as 10 to give other threads priority.
    """
    if _limited():
        return _Caller()
    # On Linux nice(2) changes the nice value of the calling thread, not of the whole process.
    # Source: https://man7.org/linux/man-pages/man2/nice.2.html, "BUGS" (2026-11-27).
    return ThreadPoolExecutor(threads, initializer=os.nice, initargs=(nice,))


class _Caller(Executor):
    """Call each submitted function in the thread that submits it."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        """Call the function now, and return a finished future with its result or its exception."""
        future = Future[R]()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # raised by Future.result, as in a thread pool
            future.set_exception(error)
        return future


def _limited() -> bool:
    """Return whether `ulimit -v` is set.

    With such a limit a new thread may fail before it reports that it has started;
    threading.Thread.start() then never returns.
    Source: CPython 3.11, Lib/threading.py, Thread.start, self._started.wait() (2026-11-27).
    """
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY

"""Hash the files that compute attention, whatever their size; remember the hashes of large ones.

A remembered hash counts only while the file's device, inode, size, mtime and ctime are the same:
the kernel sets ctime whenever content or metadata change, and no program can set it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from attnimg.files import read_private, write_private

# Smaller files are read each time; that is faster than to look them up.
_CACHED_BYTES = 1 << 20
# A file that changed this short a time ago may change again without another ctime: clocks of file
# systems tick every few milliseconds, some network file systems every second.
_SETTLED_S = 2.0
_FILE = "hashes.json"
_FILE_BYTES = 4 << 20


class ContentHashes:
    """Hash files, and keep the hashes of large ones in a folder.

    Args:
        folder: this user's own; None to remember nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._known = _load(folder) if folder else {}
        self._new: dict[str, str] = {}

    def of_files(self, root: Path, files: Iterable[Path]) -> str:
        """Return one hash of the names and the content of files.

        Args:
            root: the folder that their names count from.
            files: regular files; each is read, or its hash remembered.

        Raises:
            OSError: a file can't be read.
        """
        paths = sorted(files)
        with ThreadPoolExecutor(4) as pool:  # hashing leaves Python's lock
            hashes = list(pool.map(self._of_file, paths))
        listed = [
            (os.path.relpath(path, root), found) for path, found in zip(paths, hashes, strict=True)
        ]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def of_folder(self, folder: Path) -> str:
        """Return one hash of all files below a folder but Python's own caches.

        Raises:
            OSError: a file can't be read.
        """
        return self.of_files(folder, filter(_computes, folder.rglob("*")))

    def of_package(self, name: str) -> str | None:
        """Return one hash of a distribution's files; "" when it is not installed.

        Returns:
            None when the distribution does not list its files, as some that were not installed
            by pip do not.

        Raises:
            OSError: a file can't be read.
        """
        try:
            files = metadata.distribution(name).files
        except metadata.PackageNotFoundError:
            return ""
        if files is None:
            return None
        root = Path(str(metadata.distribution(name).locate_file("")))
        return self.of_files(root, filter(_computes, (Path(str(f.locate())) for f in files)))

    def of_torch(self) -> str:
        """Return one hash of torch's compiled libraries: 0.5 GB on a CPU, 2 GB with CUDA."""
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            return ""
        folder = Path(spec.origin).parent
        return self.of_files(folder, (path for path in folder.glob("lib/*.so*") if path.is_file()))

    def save(self) -> None:
        """Write the hashes of large files to the folder; one that can't be written costs time."""
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
    """Tell whether a path is a file, and none that Python writes itself."""
    return path.parent.name != "__pycache__" and path.is_file()


def _identity_of(found: os.stat_result) -> str:
    """Return what a remembered hash stands under."""
    identity = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return ":".join(map(str, identity))


def _load(folder: Path) -> dict[str, str]:
    """Read the remembered hashes; none where the file is missing, damaged or another user's."""
    try:
        kept = json.loads(read_private(folder / _FILE, at_most=_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {name: found for name, found in kept.items() if isinstance(found, str)}

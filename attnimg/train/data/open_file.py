"""Open a data file as text bytes, unpacked by what its first bytes say, whatever its name says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, cast

from attnimg.errors import AttnimgError

# Suffixes that a name has after its format's own: train.jsonl.zst.
COMPRESSED = frozenset({".gz", ".zst", ".zstd", ".xz", ".bz2"})

# The longest line or JSON value that is read as one record, so that a broken or malicious file
# ends in a sentence instead of the machine's memory. The longest single books are near 5 MiB.
LIMIT_BYTES = 64 << 20
IN_ONE = f"{LIMIT_BYTES >> 20} MiB in one {{}}"

# Most consecutive empty lines: a compressed file with nothing else takes hours to unpack.
LIMIT_BLANK_LINES = 1 << 20

# What helps against text in another encoding.
AS_UTF8 = "write the file in UTF-8: `iconv -f ENCODING -t UTF-8 FILE > NEW`, and name the new one"

# What broken compressed files raise: zstd's errors are OSError, UnicodeDecodeError is not one.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow

    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")))


def _xz(path: Path) -> IO[bytes]:
    return cast(IO[bytes], lzma.LZMAFile(path))


# Source: the first bytes in RFC 1952, RFC 8878 and the .xz and bzip2 formats (2026-11-26).
_OPENERS: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": lambda path: cast(IO[bytes], gzip.GzipFile(path)),
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\xfd7zXZ\x00": _xz,
    b"BZh": lambda path: cast(IO[bytes], bz2.BZ2File(path)),
}

# Archives and pointers hold no records themselves; each with the command that gives the files.
_OTHERS = {
    b"PK\x03\x04": ("a zip archive", "unzip {path}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {path}"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x {path}"),
    b"\x04\x22\x4d\x18": ("an lz4 file", "lz4 -d {path}"),
}
_POINTER = b"version https://git-lfs"
_TAR = (257, b"ustar")  # where a tar archive has its magic
# Formats that are no text, by their first bytes.
_BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow"}


def check_regular(path: Path, *, key: str) -> None:
    """Refuse what is no regular file: a pipe, a socket or a device may never end.

    Raises:
        AttnimgError: the path leads to something else than a file.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
    }  # fmt: skip
    raise AttnimgError(
        f"{path} is not a regular file",
        why=f"found {kinds.get(stat.S_IFMT(mode), 'something else')}, needed a file that can be "
        "read more than once",
        do=f"write what it gives to a file (`cat {path} > data.jsonl`), and name that file in "
        f"{key}.path",
        code="bad-data",
        key=f"{key}.path",
    )


def check_packing(path: Path, *, declared: str | None, key: str) -> None:
    """Refuse an archive or a Git LFS pointer by the command that gives the files in it.

    Args:
        path: a regular file.
        declared: the format that it is read in; None when that is not known.
        key: "datasets[0]".

    Raises:
        AttnimgError: the file holds no records itself, or in another format.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(_POINTER):
        raise AttnimgError(
            f"{path} was not downloaded",
            why="found a Git LFS pointer, which names the data but does not contain it",
            do=f"git -C {path.parent} lfs pull",
            code="bad-data",
            key=f"{key}.path",
        )
    found = next((other for magic, other in _OTHERS.items() if start.startswith(magic)), None)
    packed_tar = {".tar", ".tgz", ".tbz2", ".txz"} & {suffix.lower() for suffix in path.suffixes}
    if packed_tar or start[_TAR[0] :].startswith(_TAR[1]):
        found = ("a tar archive", "tar -xf {path}")
    if found:
        raise AttnimgError(
            f"cannot read {path}",
            why=f"found {found[0]}, needed plain, gzip, zstd, xz or bzip2 data",
            do=f"unpack it (`{found[1].format(path=path)}`), and name the files in {key}.path",
            code="bad-data",
            key=f"{key}.path",
        )
    binary = next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), None)
    if binary and declared != binary:
        raise AttnimgError(
            f"{path} is in another format than expected",
            why=f"found {binary}, needed {declared or 'a known format'}",
            do=f"set {key}.ds_type: {binary}",
            code="bad-value",
            key=f"{key}.ds_type",
        )


def open_data(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacked where it is compressed."""
    with path.open("rb") as file:
        start = file.read(8)
    found = (opener for magic, opener in _OPENERS.items() if start.startswith(magic))
    return next(found, lambda plain: plain.open("rb"))(path)


class TooLong(ValueError):
    """A line, or a JSON value, that exceeds LIMIT_BYTES; or too many empty lines."""

    def __init__(self, what: str, *, do: str = "cut it into several records") -> None:
        super().__init__(f"found more than {what}")
        self.do = do


def read_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a file.

    Raises:
        TooLong: a line exceeds LIMIT_BYTES, or LIMIT_BLANK_LINES follow one another.
    """
    blank = 0
    while line := file.readline(LIMIT_BYTES + 1):
        if len(line) > LIMIT_BYTES:
            raise TooLong(IN_ONE.format("line"))
        blank = blank + 1 if line in (b"\n", b"\r\n") else 0
        if blank > LIMIT_BLANK_LINES:
            do = "write the file again without its empty lines: `grep . FILE > NEW`"
            raise TooLong(f"{LIMIT_BLANK_LINES:,} empty lines in a row", do=do)
        yield line

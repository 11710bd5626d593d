"""Read the records of a JSON file as a stream, and say where broken JSON breaks.

A file holds lines, one array, one object around an array (`{"data": [...]}`), or records one after
another that each take several lines.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Literal, TypeVar, cast

from attnimg.errors import AttnimgError

CHUNK_BYTES = 1 << 20

SPACE = " \t\r\n"

SPACES = re.compile(f"[{SPACE}]+")

BLANK = b"\xef\xbb\xbf \t\r\n"

MESSAGE = frozenset({"role", "from"})  # keys of a message: a list of messages is one record's

Opened = Callable[[], IO[bytes]]

Numbered = tuple[Literal["line", "record"], int, object]

T = TypeVar("T")


class BrokenJson(ValueError):
    """Text that is not JSON, with the place in words ("line 3"), the reason and what to do."""

    def __init__(self, place: str, why: str, *, do: str = "") -> None:
        super().__init__(f"{place}: {why}")
        self.place, self.why, self.do = place, why, do


def read_json(opened: Opened, columns: Collection[str]) -> Iterator[Numbered]:
    """Yield unit, number and value of each record.

    Args:
        opened: opens the file at its start; called more than once.
        columns: names of columns that records have. An object with one of them is a record
            itself, not an object around records.

    Raises:
        BrokenJson: it is not JSON in UTF-8.
    """
    read, unit = _layout(opened, columns)
    number = 0
    with opened() as file:
        if unit == "line":
            yield from _lines(file)
            return
        window = _Window(file)
        try:
            window.skip_space()
            for number, value in enumerate(read(window), start=1):
                yield unit, number, value
        except UnicodeDecodeError as error:
            why = f"found byte {error.object[error.start]:#04x}, needed UTF-8 text"
            raise BrokenJson(f"after record {number}", why, do=AS_UTF8) from None


def _layout(
    opened: Opened, columns: Collection[str]
) -> tuple[Callable[[_Window], Iterator[object]], Literal["line", "record"]]:
    """Look at the start of a file; what is broken there is read as lines, the commoner format."""
    with opened() as file:
        start = b""
        while not start and (chunk := file.read(1024)):
            start = chunk.lstrip(BLANK)[:1]
    if start == b"[":
        return _array, "record"
    alone, followed = _first_line(opened) if start == b"{" else (True, True)
    if not followed and (name := _attempt(opened, lambda window: _list_name(window, columns))):
        return lambda window: _wrapped(window, name, columns), "record"
    if alone or _attempt(opened, lambda window: window.value(1)) is None:
        return _values, "line"
    return _values, "record"


def _first_line(opened: Opened) -> tuple[bool, bool]:
    """Return whether the first line is a value of its own, and if so, whether more lines follow."""
    with opened() as file:
        lines = (line for line in read_lines(file) if line.strip(BLANK))
        try:
            json.loads(next(lines, b"").decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return False, False
        try:
            return True, next(lines, None) is not None
        except TooLong:
            return True, True


def _attempt(opened: Opened, look: Callable[[_Window], T]) -> T | None:
    """Look at the start of a file; None where it is broken."""
    with opened() as file:
        try:
            window = _Window(file)
            window.skip_space()
            return look(window)
        except (BrokenJson, UnicodeDecodeError):
            return None


def _lines(file: IO[bytes]) -> Iterator[Numbered]:
    number = 0
    try:
        for number, line in enumerate(read_lines(file), start=1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield "line", number, json.loads(text)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        why = f"found byte {byte:#04x} at column {error.start + 1}, needed UTF-8 text"
        raise BrokenJson(f"line {number}", why, do=AS_UTF8) from None
    except json.JSONDecodeError as error:
        why = f"found broken JSON at column {error.colno} ({error.msg})"
        raise BrokenJson(f"line {number}", f"{why}, needed one object a line") from None
    except TooLong as error:
        raise BrokenJson(f"line {number + 1}", str(error), do=error.do) from None
    except (RecursionError, ValueError) as error:
        raise BrokenJson(f"line {number}", _unfit(error)) from None


def _unfit(error: Exception) -> str:
    """Return why Python's reader refuses JSON that is well formed."""
    if isinstance(error, RecursionError):
        return "found lists or objects nested too deep, needed flat records"
    return f"found a number that cannot be read ({str(error).partition(';')[0]})"


def _array(window: _Window) -> Iterator[object]:
    """Yield the elements of the array that a file holds."""
    window.take("[")
    yield from window.elements()
    window.end()


def _values(window: _Window) -> Iterator[object]:
    """Yield values that stand one after another."""
    number = 0
    while window.peek():
        number += 1
        yield window.value(number)
        window.skip_space()


def _members(window: _Window) -> Iterator[str]:
    """Yield the keys of an object; whoever asks for the next has read the value before."""
    window.take("{")
    window.skip_space()
    while window.peek() != "}":
        yield str(window.value())
        window.skip_space()
        if window.peek() == "}":
            break
        window.take(",")
        window.skip_space()
    window.take("}")


def _list_name(window: _Window, columns: Collection[str]) -> str | None:
    """Return the key of the list of objects in an object; None when the object is a record."""
    found = empty = None
    try:
        for key in _members(window):
            window.colon()
            if key in columns:
                return None  # columns may come after a list of objects
            if window.peek() != "[":
                window.value()
                continue
            window.take("[")
            window.skip_space()
            objects = window.peek() == "{"
            empty = key if window.peek() == "]" else empty
            for value in window.elements():
                if objects and found is None and isinstance(value, dict):
                    if not value.keys().isdisjoint(MESSAGE):
                        return None
                    found = key
    except (BrokenJson, UnicodeDecodeError):
        if found is None:
            raise
    return found or empty


def _wrapped(window: _Window, name: str, columns: Collection[str]) -> Iterator[object]:
    """Yield the elements of the list that an object holds under a key."""
    for key in _members(window):
        window.colon()
        if window.peek() != "[" and key not in columns:
            window.value()
            continue
        objects = window.peek() == "["
        if objects:
            window.take("[")
            window.skip_space()
            if key == name:
                yield from window.elements()
                continue
            objects = window.peek() == "{"
        if objects or key in columns:
            why = f"found records under {name!r} and also {key!r}, needed one list of records"
            do = f"write the list {name!r} to a file of its own, and name that"
            raise BrokenJson(f"line {window.line_number()}", why, do=do)
        for _ in window.elements():
            pass
    window.end()


class _Window:
    """The part of a text file that is being parsed; grows until one value fits in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.ended = False

    def grow(self, size: int = CHUNK_BYTES) -> bool:
        """Read on; False at the end of the file."""
        if self.ended:
            return False
        chunk = self.file.read(size)
        self.ended = not chunk
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + self.decoder.decode(chunk, final=self.ended)
        self.at = 0
        return bool(chunk)

    def peek(self) -> str:
        """Return the next character; "" at the end."""
        while self.at >= len(self.text) and self.grow():
            pass
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        """Go on to the next character that is not white space."""
        while (character := self.peek()) and character in SPACE:
            found = SPACES.match(self.text, self.at)
            self.at = found.end() if found else self.at

    def take(self, character: str, *, after: int = 0) -> None:
        """Go past one character, which must be there."""
        if self.peek() != character:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.error(f"found {found}, needed {character!r}", after=after)
        self.at += 1

    def colon(self) -> None:
        """Go past the colon between a key and its value."""
        self.skip_space()
        self.take(":")
        self.skip_space()

    def end(self) -> None:
        """Check that nothing follows."""
        self.skip_space()
        if self.peek():
            raise self.error("found more text after the end of the records, needed nothing")

    def elements(self) -> Iterator[object]:
        """Yield the elements of an array whose bracket is taken, and go past its end."""
        number = 0
        self.skip_space()
        while self.peek() != "]":
            number += 1
            if number > 1:
                self.take(",", after=number - 1)
                self.skip_space()
            yield self.value(number)
            self.skip_space()
        self.take("]")

    def value(self, number: int = 0) -> object:
        """Parse the next value; `number` is that of the record, for errors."""
        size = CHUNK_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LIMIT_BYTES:
                    long = TooLong(IN_ONE.format("value"))
                    raise self.error(str(long), record=number, do=long.do) from None
                # The value may go on past the window; doubling keeps a long one linear.
                if not self.grow(size):
                    self.at = error.pos if error.doc is self.text else self.at
                    raise self.error(f"found broken JSON ({error.msg})", record=number) from None
                size *= 2
                continue
            except (RecursionError, ValueError) as error:
                raise self.error(_unfit(error), record=number) from None
            # A number at the window's edge may have more digits to come.
            if end == len(self.text) and self.grow(size):
                continue
            self.at = end
            return value

    def line_number(self) -> int:
        """Return the line that parsing has come to."""
        return self.line + self.text.count("\n", 0, self.at)

    def error(self, why: str, *, after: int = 0, record: int = 0, do: str = "") -> BrokenJson:
        """Build the error for the place where parsing stopped, by record and line."""
        place = f"record {record}" if record else f"after record {after}" if after else "start"
        return BrokenJson(f"{place} (line {self.line_number()})", why, do=do)


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

"""Read lines of text and records of JSON files as streams; errors name the place in the file.

A JSON file has one record per line, one array, one object with an array (`{"data": [...]}`), or
consecutive records of several lines each.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator
from itertools import count
from typing import IO, Literal, TypeVar

# The longest line or JSON value that is read as one record, so that a broken or malicious file
# raises an error instead of filling the memory. The longest single books have about 5 MiB.
LIMIT_BYTES = 64 << 20

TOO_LONG = f"found more than {LIMIT_BYTES >> 20} MiB in one {{}}"
CUT = "split it into several records"

# Limit of consecutive empty lines: a compressed file of empty lines would take hours to unpack.
LIMIT_BLANK_LINES = 1 << 20

# Advice for text in another encoding.
AS_UTF8 = "convert the file to UTF-8: `iconv -f ENCODING -t UTF-8 FILE > NEW`, and name the new one"

CHUNK_BYTES = 1 << 20
SPACES = re.compile(r"[ \t\r\n]*")
SKIPPED = b"\xef\xbb\xbf \t\r\n"  # a byte order mark and white space
MESSAGE_KEYS = frozenset({"role", "from"})  # keys of a message: a list of messages is one record

Open = Callable[[], IO[bytes]]
Numbered = tuple[Literal["line", "record"], int, object]
T = TypeVar("T")


class BrokenFile(ValueError):
    """Raised for a file that is not valid in its format.

    Attributes:
        place: the place of the error, such as "line 3"; "" for the file as a whole.
        why: the reason.
        do: advice; "" where the file has to be written again.
    """

    def __init__(self, place: str, why: str, *, do: str = "") -> None:
        super().__init__(f"{place}: {why}")
        self.place, self.why, self.do = place, why, do


def read_lines(file: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the number, from 1, and the text of each line.

    Raises:
        BrokenFile: a line is not UTF-8 or exceeds LIMIT_BYTES, or LIMIT_BLANK_LINES follow one
            another.
    """
    blank = 0
    for number in count(1):
        line = file.readline(LIMIT_BYTES + 1)
        if not line:
            return
        place = f"line {number}"
        if len(line) > LIMIT_BYTES:
            raise BrokenFile(place, TOO_LONG.format("line"), do=CUT)
        blank = blank + 1 if line in (b"\n", b"\r\n") else 0
        if blank > LIMIT_BLANK_LINES:
            do = "write the file again without its empty lines: `grep . FILE > NEW`"
            raise BrokenFile(
                place, f"found more than {LIMIT_BLANK_LINES:,} empty lines in a row", do=do
            )
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            why = f"found byte {byte:#04x} at column {error.start + 1}, needed UTF-8 text"
            raise BrokenFile(place, why, do=AS_UTF8) from None
        yield number, text


def read_json(open_file: Open, columns: Collection[str]) -> Iterator[Numbered]:
    """Yield the unit ("line" or "record"), number and value of each record.

    Args:
        open_file: opens the file at its start; called more than once.
        columns: names of columns that records have. An object with one of them is a record
            itself, not an object that contains records.

    Raises:
        BrokenFile: the file is not JSON in UTF-8.
    """
    read = _layout(open_file, columns)
    with open_file() as file:
        if read is None:
            yield from _json_lines(file)
        else:
            for number, value in enumerate(read(_Window(file)), start=1):
                yield "record", number, value


def _layout(
    open_file: Open, columns: Collection[str]
) -> Callable[[_Window], Iterator[object]] | None:
    """Return the function that reads a file's records, chosen by its start; None for JSON lines.

    A broken file is read as lines, the most common layout.
    """
    with open_file() as file:
        start = b""
        while not start and (chunk := file.read(1024)):
            start = chunk.lstrip(SKIPPED)[:1]
    if start == b"[":
        return _array
    if start != b"{":
        return None
    if name := _try_parse(open_file, lambda window: _list_name(window, columns)):
        return lambda window: _list_elements(window, name, columns)
    if _first_line_is_value(open_file) or _try_parse(open_file, _Window.value) is None:
        return None
    return _values


def _first_line_is_value(open_file: Open) -> bool:
    with open_file() as file:
        try:
            json.loads(next(text for _, text in read_lines(file) if text.strip()))
        except (ValueError, RecursionError):
            return False
    return True


def _try_parse(open_file: Open, parse: Callable[[_Window], T]) -> T | None:
    """Return the result of parsing the start of a file; None where it is broken."""
    with open_file() as file:
        try:
            return parse(_Window(file))
        except BrokenFile:
            return None


def _json_lines(file: IO[bytes]) -> Iterator[Numbered]:
    for number, text in read_lines(file):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            why = f"found invalid JSON at column {error.colno} ({error.msg})"
            raise BrokenFile(f"line {number}", f"{why}, needed one object a line") from None
        except (RecursionError, ValueError) as error:
            raise BrokenFile(f"line {number}", _unreadable_value(error)) from None
        yield "line", number, value


def _unreadable_value(error: Exception) -> str:
    """Return the reason why Python's parser can't read JSON that is well-formed."""
    if isinstance(error, RecursionError):
        return "found lists or objects that are nested too deeply"
    return f"found a number that cannot be read ({str(error).partition(';')[0]})"


def _array(window: _Window) -> Iterator[object]:
    """Yield the elements of the array in a file."""
    window.skip("[")
    yield from window.elements()
    window.end()


def _values(window: _Window) -> Iterator[object]:
    """Yield consecutive values."""
    for number in count(1):
        if not window.peek():
            return
        yield window.value(number)


def _members(window: _Window) -> Iterator[str]:
    """Yield the keys of an object; the caller reads a key's value before it asks for the next."""
    window.skip("{")
    while window.peek() != "}":
        key = str(window.value())
        window.skip(":")
        yield key
        if window.peek() != "}":
            window.skip(",")
    window.skip("}")


def _list_name(window: _Window, columns: Collection[str]) -> str | None:
    """Return the key of the list of objects in an object; None when the object is a record.

    It is a record if it has a known column or a list of messages, or if something follows it.
    """
    found = empty = None
    try:
        for key in _members(window):
            if key in columns:
                return None  # columns may come after a list of objects
            if window.peek() != "[":
                window.value()
                continue
            window.skip("[")
            objects = window.peek() == "{"
            empty = key if window.peek() == "]" else empty
            for value in window.elements():
                if objects and found is None and isinstance(value, dict):
                    if not value.keys().isdisjoint(MESSAGE_KEYS):
                        return None
                    found = key
        if window.peek():
            return None
    except BrokenFile:
        if found is None:
            raise
    return found or empty


def _list_elements(window: _Window, name: str, columns: Collection[str]) -> Iterator[object]:
    """Yield the elements of the list under a key of an object."""
    for key in _members(window):
        is_list = window.peek() == "["
        if is_list:
            window.skip("[")
            if key == name:
                yield from window.elements()
                continue
        if key in columns or (is_list and window.peek() == "{"):
            why = f"found records under {name!r} and also {key!r}, needed one list of records"
            do = f"write the list {name!r} to a separate file, and name that file"
            raise BrokenFile(f"line {window.line_number()}", why, do=do)
        if is_list:
            for _ in window.elements():
                pass
        else:
            window.value()
    window.end()


class _Window:
    """The part of a text file that is being parsed; grows until one value fits in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.text, self.at, self.line = file, "", 0, 1
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.ended = False
        self.record = 0  # the number of the last record that was read

    def grow(self, size: int, *, record: int = 0) -> bool:
        """Read more of the file; return False at its end."""
        if self.ended:
            return False
        chunk = self.file.read(size)
        self.ended = not chunk
        try:
            more = self.decoder.decode(chunk, final=self.ended)
        except UnicodeDecodeError as error:
            why = f"found byte {error.object[error.start]:#04x}, needed UTF-8 text"
            raise self.error(why, record=record, do=AS_UTF8) from None
        self.line += self.text.count("\n", 0, self.at)
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(chunk)

    def peek(self) -> str:
        """Return the next character that is not white space, and move to it; "" at the end."""
        while True:
            self.at = SPACES.match(self.text, self.at).end()  # type: ignore[union-attr]  # always
            if self.at < len(self.text) or not self.grow(CHUNK_BYTES):
                return self.text[self.at : self.at + 1]

    def skip(self, character: str) -> None:
        """Move past the given character; raise if another one is next."""
        if (found := self.peek()) != character:
            shown = repr(found) if found else "the end of the file"
            raise self.error(f"found {shown}, needed {character!r}")
        self.at += 1

    def end(self) -> None:
        """Raise if anything but white space follows."""
        if self.peek():
            raise self.error("found more text after the end of the records")

    def elements(self) -> Iterator[object]:
        """Yield the elements of an array after its opening bracket, and move past its end."""
        number = 0
        while self.peek() != "]":
            number += 1
            if number > 1:
                self.skip(",")
            yield self.value(number)
        self.skip("]")

    def value(self, number: int = 0) -> object:
        """Parse the next value; `number` is that of the record, for errors."""
        self.peek()
        size = CHUNK_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LIMIT_BYTES:
                    raise self.error(TOO_LONG.format("value"), record=number, do=CUT) from None
                # The value may continue after the window; doubling keeps parsing time linear.
                if not self.grow(size, record=number):
                    self.at = error.pos if error.doc is self.text else self.at
                    raise self.error(f"found invalid JSON ({error.msg})", record=number) from None
                size *= 2
                continue
            except (RecursionError, ValueError) as error:
                raise self.error(_unreadable_value(error), record=number) from None
            # A number at the end of the window may continue, also where the window ends in "1.5e-".
            if len(self.text) - end < 3 and not self.ended:
                self.grow(size, record=number)
                continue
            self.at, self.record = end, number or self.record
            return value

    def line_number(self) -> int:
        """Return the current line number of the parser."""
        return self.line + self.text.count("\n", 0, self.at)

    def error(self, why: str, *, record: int = 0, do: str = "") -> BrokenFile:
        """Return the error for the current place of the parser, with record and line."""
        after = f"after record {self.record}" if self.record else "start"
        place = f"record {record}" if record else after
        return BrokenFile(f"{place} (line {self.line_number()})", why, do=do)

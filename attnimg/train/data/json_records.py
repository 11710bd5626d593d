"""Read JSON lines and JSON arrays as streams, and say where broken JSON breaks."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import IO

CHUNK_BYTES = 1 << 20
SPACE = " \t\r\n"


class BrokenJson(ValueError):
    """Text that is not JSON, with the place in words ("line 3") and the reason."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{place}: {why}")
        self.place, self.why = place, why


def read_json_lines(file: IO[bytes]) -> Iterator[tuple[int, object]]:
    """Yield line number and value of each line that is not blank.

    Raises:
        BrokenJson: a line is not JSON in UTF-8.
    """
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield number, json.loads(text)
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            why = f"found byte {byte:#04x} at column {error.start + 1}, needed UTF-8 text"
            raise BrokenJson(f"line {number}", why) from None
        except json.JSONDecodeError as error:
            why = f"found broken JSON at column {error.colno} ({error.msg})"
            raise BrokenJson(f"line {number}", f"{why}, needed one object a line") from None


def read_json_array(file: IO[bytes]) -> Iterator[object]:
    """Yield the elements of the array that a file holds.

    Raises:
        BrokenJson: it is not one array of JSON values, or not UTF-8.
    """
    text = _Window(file)
    text.skip_space()
    text.take("[")
    text.skip_space()
    number = 0
    while text.peek() != "]":
        number += 1
        if number > 1:
            text.take(",", after=number - 1)
            text.skip_space()
        yield text.value(number)
        text.skip_space()
    text.take("]")
    text.skip_space()
    if text.peek():
        raise text.error("found more text after the array, needed its end", after=number)


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
        """Give the next character; "" at the end."""
        while self.at >= len(self.text) and self.grow():
            pass
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        """Go on to the next character that is not white space."""
        while (character := self.peek()) and character in SPACE:
            self.at += 1

    def take(self, character: str, *, after: int = 0) -> None:
        """Go past one character, which must be there."""
        if self.peek() != character:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise self.error(f"found {found}, needed {character!r}", after=after)
        self.at += 1

    def value(self, number: int) -> object:
        """Parse the next value, record `number` of the array."""
        size = CHUNK_BYTES
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # The value may go on past the window; doubling keeps a long one linear.
                if not self.grow(size):
                    self.at = error.pos if error.doc is self.text else self.at
                    raise self.error(f"found broken JSON ({error.msg})", record=number) from None
                size *= 2
                continue
            # A number at the window's edge may have more digits to come.
            if end == len(self.text) and self.grow(size):
                continue
            self.at = end
            return value

    def error(self, why: str, *, after: int = 0, record: int = 0) -> BrokenJson:
        """Say where parsing stopped, by record and line."""
        line = self.line + self.text.count("\n", 0, self.at)
        place = f"record {record}" if record else f"after record {after}" if after else "start"
        return BrokenJson(f"{place} (line {line})", why)

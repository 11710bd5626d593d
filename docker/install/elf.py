"""Read and edit the parts of a shared library that pruning needs.

For 64-bit little-endian ELF, which all files of an image are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

# Source: https://gabi.xinuos.com, chapters 2 and 8 (2026-11-25).
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_ENTRY = struct.Struct("<qQ")
_LOAD, _DYNAMIC = 1, 2
_SYMTAB = 2
_NULL, _NEEDED, _STRTAB = 0, 1, 5


def has_symbol_table(path: Path) -> bool:
    """Return whether a library has the symbols that only debuggers read."""
    with path.open("rb") as file:
        header = _HEADER.unpack(file.read(_HEADER.size))
        place, count = header[5], header[11]
        file.seek(place)
        table = file.read(count * _SECTION.size)
    return any(section[1] == _SYMTAB for section in _SECTION.iter_unpack(table))


def drop_needed(path: Path, prefix: str) -> list[str]:
    """Remove the needed libraries whose names begin with a prefix; return their names.

    For libraries of which no function is called. A file without them is not written to.
    """
    with path.open("rb") as file:
        header = _HEADER.unpack(file.read(_HEADER.size))
        place, count = header[4], header[9]
        file.seek(place)
        segments = list(_SEGMENT.iter_unpack(file.read(count * _SEGMENT.size)))
        start, size = next((s[2], s[5]) for s in segments if s[0] == _DYNAMIC)
        file.seek(start)
        entries = list(_until_null(file.read(size)))
        address = next(value for tag, value in entries if tag == _STRTAB)
        loaded = (s for s in segments if s[0] == _LOAD)
        names = next(address - s[3] + s[2] for s in loaded if s[3] <= address < s[3] + s[5])
        asked = [value for tag, value in entries if tag == _NEEDED]
        named = {value: _text(path, names + value) for value in asked}
    dropped = {value for value, name in named.items() if name.startswith(prefix)}
    if dropped:
        kept = [e for e in entries if e[0] != _NEEDED or e[1] not in dropped]
        kept += [(_NULL, 0)] * (len(entries) - len(kept))
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"".join(_ENTRY.pack(*entry) for entry in kept))
    return sorted(named[value] for value in dropped)


def _until_null(table: bytes) -> Iterator[tuple[int, int]]:
    for tag, value in _ENTRY.iter_unpack(table):
        if tag == _NULL:
            return
        yield tag, value


def _text(path: Path, place: int) -> str:
    """Read a string that ends with a zero byte."""
    with path.open("rb") as file:
        file.seek(place)
        return file.read(4096).partition(b"\0")[0].decode()

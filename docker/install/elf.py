"""What the loader reads of a shared library, as far as pruning looks at it.

For 64-bit little-endian ELF, as all of an image is.
"""

from __future__ import annotations

import struct
from pathlib import Path

# Source: https://gabi.xinuos.com, chapters 2 and 8 (2026-11-25).
_HEADER = struct.Struct("<16xHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMTAB = 2


def has_symbol_table(path: Path) -> bool:
    """Whether a library still has the symbols that only debuggers read."""
    with path.open("rb") as file:
        header = _HEADER.unpack(file.read(_HEADER.size))
        place, count = header[5], header[11]
        file.seek(place)
        table = file.read(count * _SECTION.size)
    return any(section[1] == _SYMTAB for section in _SECTION.iter_unpack(table))

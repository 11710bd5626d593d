"""Read the two texts from their Debian packages: ar, tar, dictd's and the Bible's formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from itertools import pairwise
from pathlib import Path

# Computed from the packages of Debian 12 on 2026-11-21.
SHA256 = {
    "dict-devil_1.0-13.1_all.deb": (
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154"
    ),
    "bible-kjv-text_4.38_all.deb": (
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a"
    ),
}


def read_dictionary(folder: Path) -> tuple[str, str]:
    """Return the index and the text of The Devil's Dictionary, in dictd's format.

    Args:
        folder: holds the .deb files.
    """
    deb = folder / "dict-devil_1.0-13.1_all.deb"
    index = read_deb(deb, "./usr/share/dictd/devil.index")
    text = gzip.decompress(read_deb(deb, "./usr/share/dictd/devil.dict.dz"))
    return index.decode("ascii"), text.decode("ascii")


def read_bible(folder: Path) -> str:
    """Return the King James text: a title, then one verse per line after its place ("Ge1:1")."""
    deb = folder / "bible-kjv-text_4.38_all.deb"
    return unpack_bible(read_deb(deb, "./usr/lib/bible.data"))


def read_deb(deb: Path, member: str) -> bytes:
    """Read one file out of a .deb, an ar archive that holds data.tar.xz.

    Raises:
        ValueError: the package is not the pinned one.
    """
    archive = deb.read_bytes()
    found = hashlib.sha256(archive).hexdigest()
    if found != SHA256[deb.name]:
        raise ValueError(f"{deb}: sha256 is {found}, needed {SHA256[deb.name]}")
    offset = len(b"!<arch>\n")
    while offset < len(archive):
        name = archive[offset : offset + 16].decode().strip()
        size = int(archive[offset + 48 : offset + 58])
        start = offset + 60
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(archive[start : start + size])) as tar:
                extracted = tar.extractfile(member)
                assert extracted is not None, member
                return extracted.read()
        offset = start + size + size % 2  # members start on even bytes
    raise ValueError(f"{deb}: no data.tar inside")


def unpack_lzw(packed: bytes) -> bytes:
    """Undo compress(1): codes of 9 to 16 bits, lowest bit first, 256 clears the table.

    Args:
        packed: the codes, without compress's header of three bytes.
    """
    width, offset, group_start = 9, 0, 0
    table = [bytes([i]) for i in range(256)] + [b""]
    out: list[bytes] = []
    previous = b""
    while offset + width <= len(packed) * 8:
        window = int.from_bytes(packed[offset // 8 : offset // 8 + 4], "little")
        code = window >> offset % 8 & (1 << width) - 1
        offset += width
        if code == 256:
            del table[257:]
            previous, next_width = b"", 9
        else:
            entry = table[code] if code < len(table) else previous + previous[:1]
            if previous and len(table) < 1 << 16:
                table.append(previous + entry[:1])
            out.append(entry)
            previous = entry
            next_width = min(16, max(width, len(table).bit_length()))
        if next_width != width:
            # Codes stand in groups of eight; the last group of each width is padded.
            group_bits = width * 8
            offset = group_start + -(-(offset - group_start) // group_bits) * group_bits
            group_start, width = offset, next_width
    return b"".join(out)


def unpack_bible(data: bytes) -> str:
    """Undo the package's container: a table of offsets, then blocks that compress(1) made.

    The table starts at byte 80 with (0, block size, number of blocks), 32 bits each, big endian;
    the blocks follow one another, and only the first keeps the header of compress(1).
    """
    blocks = struct.unpack_from(">I", data, 88)[0]
    offsets = struct.unpack_from(f">{blocks + 1}I", data, 92)
    blocks_packed = (data[start:end] for start, end in pairwise(offsets))
    return b"".join(unpack_lzw(block) for block in blocks_packed).decode("ascii")

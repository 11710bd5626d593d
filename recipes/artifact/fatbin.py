"""List the GPU machine code in a binary: NVIDIA's fat binaries and the offload bundles of HIP.

NVIDIA does not document the container of fat binaries. What is read here was found by compiling
with nvcc 13.0.88 and comparing with cuobjdump (2026-11-25); tests/gates compares again. A header of
16 bytes is followed by entries; each has a header with its architecture, so no payload has to be
decompressed:

    header  u32 magic, u16 version, u16 header bytes, u64 bytes of all entries
    entry   u16 kind, u16 version, u32 header bytes, u64 payload bytes, ...
            at 28: u32 architecture (90), at 40: u64 flags

cuobjdump can't replace this module. 13.5.37 refuses libbitsandbytes_cuda121.so of bitsandbytes
0.50, 8 codes, as "Invalid ELF"; it finds no device code in the kernels that CuTe DSL compiles, in
triton's libcheckpoint.so with its 15 codes, nor in any file of AMD's; and it leaves out the f of
sm_100f (measured 2026-11-27). cuobjdump.py compares with its list where it can.

HIP's bundle is documented: https://clang.llvm.org/docs/ClangOffloadBundler.html (2026-11-25).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO

import zstandard

_FATBIN = struct.pack("<I", 0xBA55ED50)
_KINDS = {1: "compute", 2: "sm", 8: "lto"}
_ARCH_SPECIFIC, _FAMILY_SPECIFIC = 0x100000, 0x200000
_BUNDLE, _COMPRESSED_BUNDLE = b"__CLANG_OFFLOAD_BUNDLE__", b"CCOB"
_BUNDLE_PATTERN = re.compile(re.escape(_BUNDLE) + b"|" + _COMPRESSED_BUNDLE)
_FATBIN_PATTERN = re.compile(re.escape(_FATBIN))
# In a cubin, the OS/ABI byte of the ELF header is 0x33 or 0x41.
_EMBEDDED = re.compile(re.escape(_FATBIN) + rb"\x01\x00\x10\x00|\x7fELF\x02\x01\x01[\x33\x41]")
CUDA_MACHINE = 190
# Set in the flags of sm_90a, up to CUDA 12. Source: EF_CUDA_ACCELERATORS in BinaryFormat/ELF.h of
# llvm/llvm-project 008d0233 (2026-11-25).
_ACCELERATED = 0x800
# ptxas writes its notes before the code.
_CUBIN = 1 << 16
_CHUNK = 1 << 20
# Bytes read for the table at the start of a bundle; no larger table has been seen.
_TABLE = 1 << 16


def is_fatbin(start: bytes) -> bool:
    """Return whether these first bytes of a file are those of a fat binary."""
    return start.startswith(_FATBIN)


def fatbin_codes(stream: BinaryIO, *, start: int, size: int) -> frozenset[str]:
    """Return the code in a section of fat binaries: sm_90a machine code, compute_90 PTX, lto_90.

    Args:
        stream: of the whole file; its position changes.
        start: offset of the section.
        size: its bytes.

    Raises:
        ValueError: it has no fat binary, or a truncated one.
    """
    codes: set[str] = set()
    place, end = start, start + size
    while (place := _find(stream, _FATBIN_PATTERN, place, end)) >= 0:
        stream.seek(place)
        _, _, header, payload = struct.unpack("<IHHQ", _read_exactly(stream, 16))
        if place + header + payload > end:
            raise ValueError(f"the fat binary at {place} is cut off")
        codes.update(_entries(stream, place + header, place + header + payload))
        place += header + payload
    if not codes:
        raise ValueError(f"found no fat binary in {size} bytes")
    return frozenset(codes)


def embedded_codes(stream: BinaryIO, *, start: int, size: int) -> frozenset[str]:
    """Return NVIDIA's machine code among other data, as in cuFFT and in kernels of CuTe DSL.

    Bytes that only look like machine code, and can't be parsed, are skipped.
    """
    codes: set[str] = set()
    place, end = start, start + size
    while (place := _find(stream, _EMBEDDED, place, end)) >= 0:
        stream.seek(place)
        head = stream.read(64)
        length = 0
        if head.startswith(_FATBIN) and len(head) >= 16:
            length = 16 + struct.unpack_from("<Q", head, 8)[0]
            with suppress(ValueError):
                codes |= fatbin_codes(
                    stream, start=place, size=length if place + length <= end else 0
                )
        elif len(head) == 64 and struct.unpack_from("<H", head, 18)[0] == CUDA_MACHINE:
            flags, abi = struct.unpack_from("<I", head, 48)[0], head[8]
            stream.seek(place)
            codes.add(cubin_code(flags, abi, stream.read(min(_CUBIN, end - place))))
        place += max(length, 16)
    return frozenset(codes)


def cubin_code(flags: int, abi: int, data: bytes) -> str:
    """Return a cubin's target: its number from the ELF flags, its letter from them or ptxas' note.

    ABI version 7, of CUDA 12, has a flag for the letter and no note; 8 has the note (the two ptxas
    of triton 3.8.0, 12.9.86 and 13.3.33, 2026-11-25).

    Args:
        flags: e_flags of its header; ABI version 8 (CUDA 13) moved the number up.
        abi: the header's ABI version.
        data: of the cubin, as far as its notes.
    """
    if abi < 8:
        return f"sm_{flags & 0xFF}{'a' if flags & _ACCELERATED else ''}"
    number = flags >> 8 & 0xFF
    found = re.search(rb"-arch sm_(\d+)([af]?)", data)
    letter = found[2].decode() if found and int(found[1]) == number else ""
    return f"sm_{number}{letter}"


def _entries(stream: BinaryIO, place: int, end: int) -> Iterator[str]:
    while place < end:
        stream.seek(place)
        head = _read_exactly(stream, 64)
        kind, _, header, payload = struct.unpack_from("<HHIQ", head)
        if header < 64 or place + header + payload > end:
            raise ValueError(f"the entry at {place} is cut off")
        arch, flags = struct.unpack_from("<I", head, 28)[0], struct.unpack_from("<Q", head, 40)[0]
        suffix = "a" if flags & _ARCH_SPECIFIC else "f" if flags & _FAMILY_SPECIFIC else ""
        yield f"{_KINDS.get(kind, f'kind{kind}')}_{arch}{suffix}"
        place += header + payload


def bundle_codes(stream: BinaryIO, *, start: int, size: int) -> frozenset[str]:
    """Return the targets of HIP's bundles in a section: gfx942, without suffixes such as xnack.

    Raises:
        ValueError: it has no bundle, or one that does not match the documentation.
    """
    codes: set[str] = set()
    place, end = start, start + size
    while (place := _find(stream, _BUNDLE_PATTERN, place, end)) >= 0:
        stream.seek(place)
        data = stream.read(min(_TABLE, end - place))
        length = len(_BUNDLE)
        if data.startswith(_COMPRESSED_BUNDLE):
            data, length = _decompress(stream, data, place, end)
        codes.update(_targets(data))
        place += length
    if not codes:
        raise ValueError(f"found no offload bundle in {size} bytes")
    return frozenset(codes)


def _targets(data: bytes) -> Iterator[str]:
    (count,) = struct.unpack_from("<Q", data, len(_BUNDLE))
    place = len(_BUNDLE) + 8
    for _ in range(count):
        if place + 24 > len(data):
            raise ValueError(f"a bundle of {count} entries is cut off")
        _, _, length = struct.unpack_from("<QQQ", data, place)
        entry = data[place + 24 : place + 24 + length].decode("ascii", "replace")
        place += 24 + length
        if found := re.search(r"-(gfx[\w-]+)(?::|$)", entry):
            yield found[1]
        elif not entry.startswith("host"):
            raise ValueError(f"a bundle has an entry {entry!r}")


def _decompress(stream: BinaryIO, head: bytes, place: int, end: int) -> tuple[bytes, int]:
    """Return the decompressed start of a compressed bundle, and the bytes of the whole bundle."""
    version, method = struct.unpack_from("<HH", head, 4)
    header = {1: 20, 2: 24, 3: 32}.get(version)
    if header is None or method not in (0, 1):
        raise ValueError(f"a compressed bundle has version {version} and method {method}")
    length = struct.unpack_from("<I" if version == 2 else "<Q", head, 8)[0]
    # Version 1 does not store its size: no section was seen that has anything after it.
    length = end - place if version == 1 else length
    stream.seek(place + header)
    try:
        if method == 0:
            return zlib.decompressobj().decompress(stream.read(_CHUNK), _TABLE), length
        with zstandard.ZstdDecompressor().stream_reader(stream, closefd=False) as reader:
            return reader.read(_TABLE), length
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"a compressed bundle can't be read: {error}") from error


def _find(stream: BinaryIO, wanted: re.Pattern[bytes], place: int, end: int) -> int:
    """Return the next offset of a pattern of at most 24 bytes before `end`; -1 for none."""
    rest = b""
    stream.seek(place)
    while place < end:
        chunk = stream.read(min(_CHUNK if rest else 64, end - place))
        if not chunk:
            return -1
        if found := wanted.search(rest + chunk):
            return place - len(rest) + found.start()
        place += len(chunk)
        rest = (rest + chunk)[-len(_BUNDLE) + 1 :]
    return -1


def _read_exactly(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("a fat binary is cut off")
    return data

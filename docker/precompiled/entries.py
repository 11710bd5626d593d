"""Read a cache entry: the architecture of its GPU code, and whether its host code needs AVX.

An entry is an x86-64 object file (a launcher) with one or more CUDA ELF images in its data, or only
such an image. In the former cuobjdump 13.5.37 finds no device code (tried 2026-11-27).
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_ELF64 = b"\x7fELF\x02\x01"
_EM_CUDA = 190
# Instructions of AVX and its extensions begin with v; the others came with the same or other CPUs
# after the first x86-64. tzcnt is left out: older CPUs run it as bsf, which LLVM relies on.
_BEYOND_BASELINE = re.compile(
    r"\t(v\w+|andn|bextr|bls\w+|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|popcnt|lzcnt|movbe)\b"
)
_INSTRUCTION = re.compile(r"^ *[0-9a-f]+:\t", re.MULTILINE)


def gpu_codes(data: bytes) -> tuple[str, ...]:
    """Return the architectures of the CUDA images in a file, "sm_90a", in their order.

    The number is read from e_flags, as in all that ptxas 13 writes (ELF ABI version 8, bits 8 to
    15; compared with nvdisasm, 2026-11-21); the letter from the options that ptxas notes. If the
    two differ, the name has both, so that it equals no architecture.
    """
    return tuple(_code(image) for image in _cuda_images(data))


def _cuda_images(data: bytes) -> Iterator[bytes]:
    at = data.find(_ELF64)
    while at >= 0:
        header = data[at : at + 64]
        if len(header) == 64 and struct.unpack_from("<H", header, 18)[0] == _EM_CUDA:
            sections_at = struct.unpack_from("<Q", header, 40)[0]
            size, count = struct.unpack_from("<HH", header, 58)
            yield data[at : at + sections_at + size * count]
        at = data.find(_ELF64, at + 4)


def _code(image: bytes) -> str:
    # Up to CUDA 12, ELF ABI version 7, the number is the lowest byte.
    number = f"sm_{struct.unpack_from('<I', image, 48)[0] >> (8 if image[8] >= 8 else 0) & 0xFF}"
    noted = set(re.findall(rb"(?:-arch[ =]|\.target )(sm_\d+[af]?)", image))
    names = sorted(name.decode() for name in noted)
    if len(names) == 1 and names[0].rstrip("af") == number:
        return str(names[0])
    return f"{number} with options for {' '.join(names) or 'nothing'}"


def check_gpu_code(entry: Path, code: str) -> None:
    """Exit if an entry has code for any other architecture than this one, such as "sm_90a"."""
    if (codes := gpu_codes(entry.read_bytes())) != (code,):
        sys.exit(f"{entry} has code for {codes}, needed {code} once")


def beyond_baseline(path: Path, *, objdump: str, env: Mapping[str, str] | None = None) -> list[str]:
    """Return the instructions of a file's host code that not every x86-64 CPU has.

    Raises:
        ValueError: objdump finds no code at all, so that finding no AVX means nothing.
    """
    command = [objdump, "--disassemble", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    if not _INSTRUCTION.search(text):
        raise ValueError(f"{path}: objdump found no instructions")
    return sorted(set(_BEYOND_BASELINE.findall(text)))

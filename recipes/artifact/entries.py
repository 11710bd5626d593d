"""Read one entry of a tar, a folder or a wheel into a File."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

from recipes.artifact.cuobjdump import list_codes
from recipes.artifact.elf import MAGIC, read_elf
from recipes.artifact.facts import Elf, File, FileKind
from recipes.artifact.fatbin import fatbin_codes, is_fatbin
from recipes.artifact.secret_patterns import secrets_in

# Larger files are not searched for secrets: no person or tool stores one in them.
_MAX_SECRET_BYTES = 1 << 20
# Files whose text is kept.
_METADATA = re.compile(r"\.dist-info/(METADATA|RECORD|INSTALLER)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One entry before it is read; `open` returns a seekable stream of a regular file."""

    path: str
    bytes: int
    mode: int
    kind: FileKind
    open: Callable[[], BinaryIO]
    target: str = ""


def read_entry(entry: Entry, *, layer: int) -> File:
    """Read an entry once: its machine code, its secrets, its text if it is metadata."""
    elf: Elf | None = None
    secrets: tuple[str, ...] = ()
    digest, text = "", ""
    if entry.kind == "file" and entry.bytes:
        with entry.open() as stream:
            start = stream.read(len(MAGIC))
            if start == MAGIC:
                stream.seek(0)
                elf = read_elf(stream)
                if elf.section_codes and elf.machine not in ("EM_CUDA", "EM_AMDGPU"):
                    elf = replace(elf, cuobjdump_codes=list_codes(stream, entry.bytes))
                stream.seek(0)
                found = hashlib.file_digest(stream, "sha256")  # type: ignore[arg-type]  # has readinto
                digest = found.hexdigest()
            elif is_fatbin(start):
                elf = _read_fatbin(stream, entry.bytes)
            elif _METADATA.search(entry.path):
                text = (start + stream.read()).decode("utf-8", "replace")
            elif entry.bytes <= _MAX_SECRET_BYTES:
                secrets = secrets_in(start + stream.read())
    return File(
        path=entry.path,
        layer=layer,
        bytes=entry.bytes,
        mode=entry.mode & 0o7777,
        kind=entry.kind,
        target=entry.target,
        digest=digest,
        elf=elf,
        secrets=secrets,
        text=text,
    )


def _read_fatbin(stream: BinaryIO, size: int) -> Elf:
    """Read a fat binary that is a file of its own."""
    try:
        return Elf(machine="EM_CUDA", codes=fatbin_codes(stream, start=0, size=size))
    except ValueError as error:
        return Elf(machine="EM_CUDA", faults=(str(error),))

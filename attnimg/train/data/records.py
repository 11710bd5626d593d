"""Read the records of local data files one at a time, each with its place in the file for errors.

At most one batch of a file is in memory, so a file may be larger than memory.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from attnimg.errors import AttnimgError
from attnimg.train.data.json_records import (
    LIMIT_BYTES,
    BrokenFile,
    Numbered,
    read_json,
    read_lines,
)

if TYPE_CHECKING:
    import pyarrow

Format = Literal["json", "csv", "parquet", "arrow", "text"]

# Columns that identify a record, unless the entry names others: those that the types read.
COLUMNS = frozenset(
    {"text", "instruction", "input", "output", "prompt", "completion", "messages", "conversations",
     "segments", "input_ids", "chosen"}
)  # fmt: skip

# Suffixes of compressed files, after the suffix of the format: train.jsonl.zst.
COMPRESSED = frozenset({".gz", ".zst", ".zstd", ".xz", ".bz2"})

# Errors raised for broken compressed files; zstd's are OSErrors. UnicodeDecodeError is not one.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)

# Archives and other files without records, with the command that extracts the files.
_ARCHIVES = {
    b"PK\x03\x04": ("a zip archive", "unzip {path}"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {path}"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x {path}"),
    b"\x04\x22\x4d\x18": ("an lz4 file", "lz4 -d {path}"),
}

# Binary formats, by their first bytes.
_BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """One file, and how to read its records.

    Attributes:
        path: the file.
        format: the format of its records.
        columns: names of columns that a record has.
    """

    path: Path
    format: Format
    columns: frozenset[str] = COLUMNS


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a record, for error messages.

    Attributes:
        file: the file or hub name.
        number: the record's number, from 1; in JSON lines and text the line number.
        unit: what the number counts.
        key: the config key of its source, "datasets[0]".
        first: whether it is the first record of its file.
    """

    file: str
    number: int
    unit: Literal["line", "record"]
    key: str
    first: bool = False

    def __str__(self) -> str:
        """Return a text such as "train.jsonl, line 3"."""
        return f"{self.file}, {self.unit} {self.number}"


Record = tuple[Place, dict[str, Any]]

Span = tuple[int, int]  # first character and the one after the last

IGNORE_INDEX = -100  # the label of a token without loss (torch's cross_entropy, ignore_index)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its completion; without a prompt, all of the text is trained on.

    Attributes:
        prompt: the text before the completion; None for plain text.
        completion: the text to train on.
        unused: the record's columns that have no effect, for types that read several columns.
    """

    prompt: str | None
    completion: str
    unused: tuple[str, ...] = field(default=(), repr=False)  # not part of the data's hash


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: the role, as the chat template names it.
        content: the text; None where the record has none, as beside tool calls.
        extra: the message's other keys, such as reasoning_content and tool_calls.
        train: whether it is trained, by the record's flag; None: the role decides.
        untrained: character spans of the content that are not trained.
        parts: the only character spans of the turn that are trained; None: all of it.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None
    untrained: tuple[Span, ...] = ()
    parts: tuple[Span, ...] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """The content of a record of the type chat_template.

    Attributes:
        turns: the messages.
        tools: JSON schemas of the functions that the assistant may call.
        unused: the record's columns that have no effect.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Segments:
    """The content of a record of the type input_output.

    Attributes:
        parts: texts in order, each with whether it is trained.
        unused: the record's columns that have no effect.
    """

    parts: tuple[tuple[bool, str], ...]
    unused: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A record that is tokenized already.

    Attributes:
        ids: its tokens.
        labels: for each token, the token or IGNORE_INDEX.
        unused: the record's columns that have no effect.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    unused: tuple[str, ...] = field(default=(), repr=False)


Parsed = Pair | Conversation | Segments | TokenRecord

Tokens = tuple[list[int], list[int]]  # input_ids and labels, equally long


def unused_warning(kind: str, names: Sequence[str]) -> str:
    """Return the warning on names of a kind ("columns") that have no effect."""
    return f"these {kind} have no effect: {', '.join(names)}"


def read_records(file: LocalFile, *, key: str) -> Iterator[Record]:
    """Yield the records of one local file.

    Raises:
        AttnimgError: the file is not valid in its format; the error names the line or record.
    """
    first = True
    try:
        for unit, number, record in _READERS[file.format](file):
            place = Place(str(file.path), number, unit, key, first)
            if not isinstance(record, dict):
                why = f"found {_json_name(record)}, needed an object with named columns"
                raise bad_record(place, why=why, do="write each record as {...}")
            yield place, record
            first = False
    except BrokenFile as error:
        at = f", {error.place}" if error.place else ""
        do = error.do.replace("{key}", key)
        do = do or "repair the file, or write it again with the tool that made it"
        raise bad_file(f"cannot read {file.path}{at}", why=error.why, do=do, key=key) from None
    except BROKEN as error:
        raise bad_file(
            f"cannot read {file.path}",
            why=f"found damaged or cut off data: {error}",
            do="copy or download the file again; if it is complete, but its compression is not "
            "supported, decompress it and name the decompressed file",
            key=key,
        ) from None


def open_data(path: Path) -> IO[bytes]:
    """Open a file for reading, and decompress it if it is compressed."""
    with path.open("rb") as file:
        start = file.read(8)
    found = (opener for magic, opener in _OPENERS.items() if start.startswith(magic))
    return cast(IO[bytes], next(found, lambda plain: plain.open("rb"))(path))


def check_regular(path: Path, *, key: str) -> None:
    """Raise unless a path is a regular file: reading a pipe, a socket or a device may never end.

    Raises:
        AttnimgError: the path is not a regular file.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    kinds = {
        stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder",
    }  # fmt: skip
    raise bad_file(
        f"{path} is not a regular file",
        why=f"found {kinds.get(stat.S_IFMT(mode), 'something else')}, needed a file that can be "
        "read more than once",
        do=f"write its content to a file (`cat {path} > data.jsonl`), and name that file in "
        f"{key}.path",
        key=key,
    )


def check_file_type(path: Path, *, declared: str | None, key: str) -> None:
    """Raise for an archive, a Git LFS pointer, or another binary format than the declared one.

    Args:
        path: a regular file.
        declared: the format in which it is read; None when that is not known.
        key: "datasets[0]".

    Raises:
        AttnimgError: with the command that extracts or downloads the data, or the ds_type to set.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"version https://git-lfs"):
        what = f"{path} was not downloaded"
        why = "found a Git LFS pointer, which refers to the data but does not contain it"
        do = f"git -C {path.parent} lfs pull"
        raise bad_file(what, why=why, do=do, key=key)
    found = next((other for magic, other in _ARCHIVES.items() if start.startswith(magic)), None)
    tar = {".tar", ".tgz", ".tbz2", ".txz"} & {suffix.lower() for suffix in path.suffixes}
    if tar or start.startswith(b"ustar", 257):
        found = ("a tar archive", "tar -xf {path}")
    if found:
        what = f"cannot read {path}"
        why = f"found {found[0]}, needed plain, gzip, zstd, xz or bzip2 data"
        do = f"unpack it (`{found[1].format(path=path)}`), and name the files in {key}.path"
        raise bad_file(what, why=why, do=do, key=key)
    binary = next((kind for magic, kind in _BINARY.items() if start.startswith(magic)), None)
    if binary and declared != binary:
        what = f"{path} is in another format than expected"
        why = f"found {binary}, needed {declared or 'a known format'}"
        do = f"set {key}.ds_type: {binary}"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.ds_type")


def bad_record(place: Place, *, why: str, do: str, code: str = "bad-data") -> AttnimgError:
    """Return the error for a record that does not fit its type."""
    return AttnimgError(f"bad record: {place}", why=why, do=do, code=code, key=f"{place.key}.path")


def bad_file(what: str, *, why: str, do: str, key: str) -> AttnimgError:
    """Return the error for a file of the dataset entry `key` that can't be used."""
    return AttnimgError(what, why=why, do=do, code="bad-data", key=f"{key}.path")


def require_column(
    record: Mapping[str, Any], name: str, place: Place, *, needed: Sequence[str], hint: str
) -> Any:
    """Return one column of a record.

    Raises:
        AttnimgError: it is missing; the error names the columns that exist and those needed.
    """
    if name in record:
        return record[name]
    why = f"found the columns {', '.join(record) or 'none'}; needed {', '.join(needed)}"
    raise bad_record(place, why=why, do=hint, code="wrong-columns" if place.first else "bad-data")


def require_text(value: object, name: str, place: Place) -> str:
    """Return a value; raise unless it is a string."""
    # A lone surrogate is not a character: JSON can contain it, UTF-8 and tokenizers can't.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    why = f"{name} is {shorten(value)}, needed text"
    do = "write it as a string, or remove the record"
    raise bad_record(place, why=why, do=do)


def shorten(value: object) -> str:
    """Return a value as JSON for an error, cut to 60 characters."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 60 else written[:57] + "..."


def _json_name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _json(file: LocalFile) -> Iterator[Numbered]:
    return read_json(partial(open_data, file.path), file.columns)


def _text(file: LocalFile) -> Iterator[Numbered]:
    with open_data(file.path) as lines:
        for number, line in read_lines(lines):
            yield "line", number, {"text": line.rstrip("\r\n")}


def _csv(file: LocalFile) -> Iterator[Numbered]:
    # The csv module's default limit of 128 KiB is too small for documents.
    csv.field_size_limit(LIMIT_BYTES)
    number, delimiter = 0, "\t" if ".tsv" in file.path.suffixes else ","
    try:
        with open_data(file.path) as lines:
            text = (line for _, line in read_lines(lines))
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            header = rows.fieldnames or ()
            if twice := sorted({name for name in header if header.count(name) > 1}):
                why = f"found the column {', '.join(twice)} twice, needed unique names"
                raise BrokenFile("", why, do="rename the columns in the file's first line")
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    found = sum(v is not None for k, v in row.items() if k) + len(row.get(None, ()))
                    needed = sum(name is not None for name in row)
                    why = f"found {found} fields, needed {needed} as in the header"
                    raise BrokenFile(f"record {number}", why)
                yield "record", number, row
    except csv.Error as error:
        raise BrokenFile(f"record {number + 1}", f"not CSV: {error}") from None


def _table(file: LocalFile) -> Iterator[Numbered]:
    """Read Parquet, Arrow's stream format (which datasets writes), or Arrow's file format."""
    import pyarrow

    try:
        batches = (_parquet if file.format == "parquet" else _arrow)(file.path)
        rows = (row for batch in batches for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield "record", number, row
    except (pyarrow.ArrowException, OSError) as error:
        do = "set {key}.ds_type to the format of the file, or write the file again"
        raise BrokenFile("", f"not {file.format.title()}: {error}", do=do) from None
    except (ValueError, OverflowError) as error:
        do = "write that column as text, or remove it from the file"
        raise BrokenFile(
            "", f"found a value that Python cannot represent: {error}", do=do
        ) from None


def _parquet(path: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=1000)


def _arrow(path: Path) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        try:
            batches = iter(pyarrow.ipc.open_stream(source))
        except pyarrow.ArrowInvalid:
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
        for batch in batches:
            yield from (batch.slice(start, 1000) for start in range(0, batch.num_rows, 1000))


_READERS: dict[Format, Callable[[LocalFile], Iterator[Numbered]]] = {
    "json": _json, "csv": _csv, "parquet": _table, "arrow": _table, "text": _text,
}  # fmt: skip


def _zstd(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


# Source: the first bytes in RFC 1952, RFC 8878 and the .xz and bzip2 formats (2026-11-26).
_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.GzipFile,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
}

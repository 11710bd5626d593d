"""Read records one at a time from local files, so that each error names its file and line.

Nothing here holds more than one batch of a file, so a file may be larger than memory.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from attnimg.errors import AttnimgError
from attnimg.train.data.json_records import (
    AS_UTF8,
    BROKEN,
    LIMIT_BYTES,
    BrokenJson,
    TooLong,
    open_data,
    read_json,
    read_lines,
)
from attnimg.train.data.sources import LocalFile


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands, for errors.

    Attributes:
        file: the file or hub name.
        number: of the record, from 1; the line number in JSON lines and text.
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
        """Say it as a person would: "train.jsonl, line 3"."""
        return f"{self.file}, {self.unit} {self.number}"


Record = tuple[Place, dict[str, Any]]


def bad_record(place: Place, *, why: str, do: str, code: str = "bad-data") -> AttnimgError:
    """Build the error for a record that is not what its type says."""
    return AttnimgError(f"bad record: {place}", why=why, do=do, code=code, key=f"{place.key}.path")


def read_records(file: LocalFile, *, key: str) -> Iterator[Record]:
    """Yield the records of one local file.

    Raises:
        AttnimgError: the file is not in its format; names the line or record.
    """
    readers = {
        "json": _json, "csv": _csv, "parquet": _parquet, "arrow": _arrow, "text": _text,
    }  # fmt: skip
    first = True
    for unit, number, record in readers[file.format](file, key):
        place = Place(str(file.path), number, unit, key, first)
        if not isinstance(record, dict):
            raise bad_record(
                place,
                why=f"found {_json_name(record)}, needed an object with named columns",
                do="write each record as {...}",
            )
        yield place, record
        first = False


def _json_name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


Numbered = tuple[Literal["line", "record"], int, object]


def _broken(path: Path, key: str, why: str, *, at: str = "", do: str = "") -> AttnimgError:
    return AttnimgError(
        f"cannot read {path}{at}",
        why=why,
        do=do or "repair the file, or write it again with the tool that made it",
        code="bad-data",
        key=f"{key}.path",
    )


def _damaged(path: Path, key: str, error: BaseException) -> AttnimgError:
    """Build the error for bytes that can't be read or unpacked."""
    return _broken(
        path,
        key,
        f"found damaged or cut off data: {error}",
        do="copy or download the file again; where it is whole but compressed in a way that is "
        "not read here, unpack it and name the unpacked file",
    )


def _json(file: LocalFile, key: str) -> Iterator[Numbered]:
    try:
        yield from read_json(partial(open_data, file.path), file.columns)
    except BrokenJson as error:
        raise _broken(file.path, key, error.why, at=f", {error.place}", do=error.do) from None
    except BROKEN as error:
        raise _damaged(file.path, key, error) from None


def _text(file: LocalFile, key: str) -> Iterator[Numbered]:
    path, number = file.path, 0
    try:
        with open_data(path) as lines:
            for number, line in enumerate(read_lines(lines), start=1):
                yield "line", number, {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except TooLong as error:
        raise _broken(path, key, str(error), at=f", line {number + 1}", do=error.do) from None
    except UnicodeDecodeError as error:
        raise _broken(
            path, key, f"not UTF-8 text: {error}", at=f", line {number}", do=AS_UTF8
        ) from None
    except BROKEN as error:
        raise _damaged(path, key, error) from None


def _csv(file: LocalFile, key: str) -> Iterator[Numbered]:
    # The library's limit of 128 KiB is shorter than documents.
    csv.field_size_limit(LIMIT_BYTES)
    path, number = file.path, 0
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    try:
        with open_data(path) as lines:
            text = (
                line.decode("utf-8-sig" if i == 0 else "utf-8")
                for i, line in enumerate(read_lines(lines))
            )
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            header = rows.fieldnames or ()
            if twice := sorted({name for name in header if header.count(name) > 1}):
                why = f"found the column {', '.join(twice)} twice, of which one would be lost"
                raise _broken(path, key, why, do="rename the columns in the file's first line")
            for number, row in enumerate(rows, start=1):
                if None in row or None in row.values():
                    found = sum(v is not None for k, v in row.items() if k) + len(row.get(None, ()))
                    needed = sum(name is not None for name in row)
                    why = f"found {found} fields, needed {needed} as in the header"
                    raise _broken(path, key, why, at=f", record {number}")
                yield "record", number, row
    except UnicodeDecodeError as error:
        why = f"not UTF-8 text: {error}"
        raise _broken(path, key, why, at=f", record {number + 1}", do=AS_UTF8) from None
    except csv.Error as error:
        raise _broken(path, key, f"not CSV: {error}", at=f", record {number + 1}") from None
    except TooLong as error:
        raise _broken(path, key, str(error), at=f", record {number + 1}", do=error.do) from None
    except BROKEN as error:
        raise _damaged(path, key, error) from None


def _parquet(file: LocalFile, key: str) -> Iterator[Numbered]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as opened:
            yield from _rows(opened.iter_batches(batch_size=1000))
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(file.path, key, f"not Parquet: {error}", do=_ds_type(key)) from None
    except (ValueError, OverflowError) as error:
        raise _unfit(file.path, key, error) from None


def _arrow(file: LocalFile, key: str) -> Iterator[Numbered]:
    """Read Arrow's stream format, which datasets writes, or its file format."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file.path)) as source:
            try:
                batches = iter(pyarrow.ipc.open_stream(source))
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            yield from _rows(
                batch.slice(start, 1000)
                for batch in batches
                for start in range(0, batch.num_rows, 1000)
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(file.path, key, f"not Arrow: {error}", do=_ds_type(key)) from None
    except (ValueError, OverflowError) as error:
        raise _unfit(file.path, key, error) from None


def _ds_type(key: str) -> str:
    return f"set {key}.ds_type to the format that it has, or write the file again"


def _rows(batches: Iterator[Any]) -> Iterator[Numbered]:
    rows = (row for batch in batches for row in batch.to_pylist())
    for number, row in enumerate(rows, start=1):
        yield "record", number, row


def _unfit(path: Path, key: str, error: Exception) -> AttnimgError:
    return _broken(
        path,
        key,
        f"found a value that Python cannot hold: {error}",
        do="write that column as text, or leave it out of the file",
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """A text to be answered and its answer; without a prompt, all of the text is learnt.

    Attributes:
        prompt: the text to be answered.
        completion: the answer.
        unused: the record's columns that have no effect, where a type reads several.
    """

    prompt: str | None
    completion: str
    unused: tuple[str, ...] = field(default=(), repr=False)  # not part of the data's hash


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its role in the chat template's terms.

    Attributes:
        role: the role.
        content: the text; None where the record has none, as beside tool calls.
        extra: the message's other keys, such as reasoning_content and tool_calls.
        train: what the record's flag says of the loss; None: as the role says.
        untrained: character spans of the content that carry no loss.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None
    untrained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a record of the type chat_template holds.

    Attributes:
        turns: the messages.
        tools: JSON schemas of the functions that the assistant may call.
        unused: the record's columns that have no effect.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


Parsed = Pair | Conversation

Parse = Callable[[Mapping[str, Any], Place], Parsed | None]


def unused_note(what: str, names: Sequence[str]) -> str:
    """Return the warning on names ("columns") that change nothing."""
    return f"these {what} have no effect: {', '.join(names)}"


def column(
    record: Mapping[str, Any], name: str, place: Place, *, needed: Sequence[str], hint: str
) -> Any:
    """Take one column of a record; the error names what is there and what is needed."""
    if name in record:
        return record[name]
    raise bad_record(
        place,
        why=f"found the columns {', '.join(record) or 'none'}; needed {', '.join(needed)}",
        do=hint,
        code="wrong-columns" if place.first else "bad-data",
    )


def text(value: object, name: str, place: Place) -> str:
    """Give a value that must be a string."""
    # Half of a surrogate pair is no character: JSON can spell it, UTF-8 and tokenizers can't.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    raise bad_record(
        place,
        why=f"{name} is {shown(value)}, needed text",
        do="write it as a string, or drop the record",
    )


def shown(value: object) -> str:
    """Write a value for an error, cut to 60 characters."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 60 else written[:57] + "..."

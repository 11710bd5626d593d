"""Read records one at a time from local files, so that each error names its file and line.

Nothing here holds more than one batch of a file, so a file may be larger than memory.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from attnimg.errors import AttnimgError
from attnimg.train.data.json_records import BrokenJson, read_json_array, read_json_lines
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
    readers = {"json": _json, "csv": _csv, "parquet": _parquet, "text": _text}
    first = True
    for number, record in readers[file.format](file.path, key):
        unit: Literal["line", "record"] = "record" if file.format in ("csv", "parquet") else "line"
        if file.format == "json" and number < 0:
            number, unit = -number, "record"
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


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _broken(path: Path, key: str, why: str, *, at: str = "") -> AttnimgError:
    return AttnimgError(
        f"cannot read {path}{at}",
        why=why,
        do="mend the file, or write it again with the tool that made it",
        code="bad-data",
        key=f"{key}.path",
    )


def _json(path: Path, key: str) -> Iterator[tuple[int, object]]:
    """JSON lines with their line numbers; the elements of an array with negative numbers."""
    try:
        with _open(path) as file:
            start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
            file.seek(0)
            if start.startswith(b"["):
                for number, element in enumerate(read_json_array(file), start=1):
                    yield -number, element
            else:
                yield from read_json_lines(file)
    except BrokenJson as error:
        raise _broken(path, key, error.why, at=f", {error.place}") from None
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise _broken(path, key, f"not UTF-8 text: {error}") from None


def _text(path: Path, key: str) -> Iterator[tuple[int, object]]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, {"text": line.decode("utf-8-sig").rstrip("\r\n")}
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise _broken(path, key, f"not UTF-8 text: {error}", at=f", line {number}") from None


def _csv(path: Path, key: str) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(sys.maxsize)  # the library's limit of 128 KiB is shorter than documents
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    number = 0
    try:
        with _open(path) as file:
            lines = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(file))
            for number, row in enumerate(
                csv.DictReader(lines, delimiter=delimiter, strict=True), 1
            ):
                if None in row or None in row.values():
                    found = sum(v is not None for k, v in row.items() if k) + len(row.get(None, ()))
                    needed = sum(name is not None for name in row)
                    why = f"found {found} fields, needed {needed} as in the header"
                    raise _broken(path, key, why, at=f", record {number}")
                yield number, row
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise _broken(path, key, f"not CSV: {error}", at=f", record {number + 1}") from None


def _parquet(path: Path, key: str) -> Iterator[tuple[int, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken(path, key, f"not Parquet: {error}") from None

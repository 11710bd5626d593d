"""Read a source's records, wherever they are, and the part of them that `split` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from attnimg.train.data.hub import load_hub, load_saved
from attnimg.train.data.records import Place, Record, read_records
from attnimg.train.data.sources import Source
from attnimg.train.data.splits import asked_split, find_rows, split_names


def read_source(source: Source) -> Iterator[Record]:
    """Yield the records of a source in order, each with its place.

    Raises:
        AttnimgError: the data are missing or broken, or the split is not one that exists.
    """
    if source.kind == "files":
        yield from _rows_of_files(source)
        return
    loaded = load_hub(source) if source.kind == "hub" else load_saved(source)
    spec, key = source.spec, source.key
    rows = find_rows(spec, {name: len(split) for name, split in loaded.items()}, key=key)
    first = True
    for name, start, stop in rows:
        part = loaded[name].select(range(start, max(start, stop)))
        for number, record in enumerate(part, start=start + 1):
            yield Place(spec.path, number, "record", key, first), record
            first = False


def _from_files(source: Source, split: str) -> Iterator[Record]:
    for file in source.splits[split]:
        yield from read_records(file, key=source.key)


def _rows_of_files(source: Source) -> Iterator[Record]:
    """Read the rows that the split names; files are read twice where it is a part of them."""
    spec, key = source.spec, source.key
    if "[" not in asked_split(spec, source.splits, key=key):
        for name in split_names(spec, source.splits, key=key):
            yield from _from_files(source, name)
        return
    lengths = dict.fromkeys(source.splits, 0)
    for name in split_names(spec, source.splits, key=key):
        lengths[name] = sum(1 for _ in _from_files(source, name))
    for name, start, stop in find_rows(spec, lengths, key=key):
        yield from islice(_from_files(source, name), start, max(start, stop))

"""Read a source's records, wherever they are, and the part of them that `split` asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from attnimg.errors import AttnimgError
from attnimg.train.data.hub import load_hub, load_saved
from attnimg.train.data.records import Place, Record, read_records
from attnimg.train.data.sources import Source

# `split: train[:1000]` or `train[10%:20%]`, the slices of the datasets library.
SLICE = re.compile(r"train(?:\[(?P<start>\d*)(?P<p>%?):(?P<stop>\d*)(?P<q>%?)\])?")


def read_source(source: Source) -> Iterator[Record]:
    """Yield the records of a source in order, each with its place.

    Raises:
        AttnimgError: the data are missing or broken, or the split is not one that exists.
    """
    if source.kind == "files":
        yield from _sliced(source)
        return
    loaded = load_hub(source) if source.kind == "hub" else load_saved(source)
    for number, record in enumerate(loaded, start=1):
        yield Place(source.spec.path, number, "record", source.key, number == 1), record


def _from_files(source: Source) -> Iterator[Record]:
    for file in source.files:
        yield from read_records(file, key=source.key)


def _sliced(source: Source) -> Iterator[Record]:
    """Take the slice that `split` names; local files have one split, train."""
    records = _from_files(source)
    if source.spec.split is None:
        return records
    found = SLICE.fullmatch(source.spec.split)
    if found is None:
        raise AttnimgError(
            f"no split {source.spec.split} in local files",
            why=f"{source.key}.split is {source.spec.split}, needed train or a slice of it",
            do="drop the split, or write `split: train[:1000]` or `train[:10%]`",
            code="bad-value",
            key=f"{source.key}.split",
        )
    total = sum(1 for _ in _from_files(source)) if "%" in source.spec.split else 0

    def bound(digits: str | None, percent: str | None) -> int | None:
        if not digits:
            return None
        return round(total * int(digits) / 100) if percent else int(digits)

    return islice(records, bound(found["start"], found["p"]) or 0, bound(found["stop"], found["q"]))

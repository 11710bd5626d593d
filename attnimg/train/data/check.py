"""Look at the data before anything heavy: are the files there, and do their records fit?"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from attnimg.config.schema import DATASET_TYPES, Config, DatasetSpec, entries
from attnimg.errors import AttnimgError
from attnimg.train.data.records import read_records
from attnimg.train.data.sources import Source, find_source
from attnimg.train.data.types import FITTING, parser


def check_sources(config: Config) -> None:
    """Refuse what can be known without a tokenizer; reads one record of each local file.

    Raises:
        AttnimgError: missing-key, bad-value, file-missing, empty-dataset, wrong-columns or
            bad-data, with the config key, the file and the record.
    """
    find_sources(config)


def find_sources(config: Config) -> tuple[list[Source], list[Source]]:
    """Find and check every source: those to train on, and test_datasets."""
    training, testing = list[Source](), list[Source]()
    for key, spec, trains in entries(config):
        if spec.type is None:
            raise _without_type(spec, key=key)
        parse = parser(spec)
        source = find_source(spec, key=key)
        found = False
        for file in source.files:
            first = next(read_records(file, key=key), None)
            if first is not None:
                place, record = first
                parse(record, place)
                found = True
        if source.kind == "files" and not found:
            raise empty(source, why="found no record in it, needed at least one")
        (training if trains else testing).append(source)
    return training, testing


def _without_type(spec: DatasetSpec, *, key: str) -> AttnimgError:
    """Build the error for an entry without a type; its first record shows which one fits."""
    columns: Collection[str] = ()
    with suppress(AttnimgError, StopIteration, IndexError):
        _, columns = next(read_records(find_source(spec, key=key).files[0], key=key))
    fitting = next((type_ for name, type_ in FITTING.items() if name in columns), None)
    return AttnimgError(
        f"{key} has no type",
        why=f"found no type for {spec.path}, needed one of {', '.join(DATASET_TYPES)}",
        do=f"set {key}.type: {fitting or ' or '.join(DATASET_TYPES[:-1])}",
        code="missing-key",
        key=f"{key}.type",
    )


def empty(source: Source, *, why: str) -> AttnimgError:
    """Build the error for a source that holds nothing to train on."""
    return AttnimgError(
        f"nothing to train on in {source.spec.path}",
        why=why,
        do=f"correct {source.key}.path, or take the entry out",
        code="empty-dataset",
        key=f"{source.key}.path",
    )

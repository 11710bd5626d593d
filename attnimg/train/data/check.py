"""Look at the data before anything heavy: are the files there, and do their records fit?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from attnimg.config.schema import DATASET_TYPES, Config, DatasetSpec
from attnimg.errors import AttnimgError
from attnimg.train.data.records import read_records
from attnimg.train.data.sources import Source, entries, find_source
from attnimg.train.data.types import is_chat, parser


def check_sources(config: Config) -> None:
    """Refuse what can be known without a tokenizer; reads one record of each local file.

    Raises:
        AttnimgError: missing-key, bad-value, file-missing, empty-dataset, wrong-columns or
            bad-data, with the config key, the file and the record.
    """
    find_sources(config)


def find_sources(config: Config) -> tuple[list[Source], list[Source]]:
    """Find and check every source: those to train on, and test_datasets."""
    _check_keys(config, [spec for _, spec, _ in entries(config)])
    training, testing = list[Source](), list[Source]()
    for key, spec, trains in entries(config):
        columns = () if spec.type in DATASET_TYPES else _columns(spec, key=key)
        parse = parser(spec, key=key, columns=columns)
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


def _columns(spec: DatasetSpec, *, key: str) -> tuple[str, ...]:
    """Return the columns of an entry's first record; () where it can't be read."""
    with suppress(AttnimgError):
        for file in find_source(spec, key=key).files:
            for _, record in read_records(file, key=key):
                return tuple(record)
    return ()


def empty(source: Source, *, why: str) -> AttnimgError:
    """Build the error for a source that holds nothing to train on."""
    return AttnimgError(
        f"nothing to train on in {source.spec.path}",
        why=why,
        do=f"correct {source.key}.path, or take the entry out",
        code="empty-dataset",
        key=f"{source.key}.path",
    )


def _check_keys(config: Config, specs: Sequence[DatasetSpec]) -> None:
    """Refuse keys that contradict one another, or that would have no effect."""
    if not (config.datasets or config.pretraining_dataset):
        raise AttnimgError(
            "no dataset",
            why="found neither datasets nor pretraining_dataset",
            do="add a line `datasets: ...`",
            code="missing-key",
            key="datasets",
        )
    if config.val_set_size and config.test_datasets:
        raise AttnimgError(
            "two ways to get validation documents",
            why=f"found val_set_size {config.val_set_size:g} and test_datasets",
            do="keep test_datasets or val_set_size",
            code="bad-value",
            key="val_set_size",
        )
    if config.default_system_message and not any(is_chat(spec) for spec in specs):
        raise AttnimgError(
            "default_system_message has no effect here",
            why="found no dataset of type chat_template, the only type with system turns",
            do="remove default_system_message",
            code="bad-value",
            key="default_system_message",
        )
    if config.default_system_message and any(
        (spec.type or "").startswith("alpaca") for spec in specs
    ):
        raise AttnimgError(
            "default_system_message does not reach alpaca records",
            why="alpaca's prompt has fixed wording; found default_system_message beside it",
            do="remove default_system_message",
            code="unsupported-key",
            key="default_system_message",
        )

"""Load the documents of a run: find its sources, prepare them, then merge, shuffle and split.

sources -> records -> types -> prepare -> this file.
Conversations are processed by conversations -> chat_render -> chat_turn -> chat_layout -> chat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import (
    COMMON_TYPES,
    Config,
    DatasetSpec,
    dataset_entries,
    trains_preferences,
)
from attnimg.errors import AttnimgError, counted, printable
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.prepare import SourceFigures, load_source, summary_line
from attnimg.train.data.prompts import TYPE_OF_COLUMN
from attnimg.train.data.records import IGNORE_INDEX, read_records
from attnimg.train.data.sources import Source, find_source
from attnimg.train.data.streams import StreamAmount, need_of
from attnimg.train.data.types import choose_parser

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Documents",
    "SourceFigures",
    "choose_chat_template",
    "find_sources",
    "load_documents",
    "load_evaluation_documents",
    "sample_text",
    "summary_line",
]

# Columns with the place of each document, which is not trained on.
PLACES = ["source", "place"]

SAMPLE_TOKENS = 400  # shown of a long document, to fit on a screen


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Everything to train on, tokenized; rows are documents of 1 to sequence_len tokens.

    Attributes:
        train: columns input_ids and labels, both list[int32] of equal length; preference data
            (preferences/data.py) also has parts.
        validation: the same columns; None without val_set_size and test_datasets.
        figures: statistics of each source, in the order of the config, test_datasets last.
        warnings: warnings for the user before training.
        train_places: where each document of `train` comes from: columns source (an index into
            figures) and place ("train.jsonl, line 3").
        validation_places: the same for `validation`.
    """

    train: Dataset
    validation: Dataset | None
    figures: tuple[SourceFigures, ...]
    warnings: tuple[str, ...] = ()
    train_places: Dataset | None = None
    validation_places: Dataset | None = None


def find_sources(config: Config) -> tuple[list[Source], list[Source]]:
    """Find the sources of a run, and check all that needs no tokenizer.

    This reads one record of each local file.

    Returns:
        The sources to train on, and those of test_datasets.

    Raises:
        AttnimgError: missing-key, bad-value, file-missing, empty-dataset, wrong-columns or
            bad-data, with the config key, the file and the record.
    """
    training, testing = list[Source](), list[Source]()
    for key, spec, trains in dataset_entries(config):
        parse: Callable[..., object] = choose_parser(spec)
        if trains_preferences(config):
            # Its modules import those of this package.
            from attnimg.train.preferences.records import choose_preference_parser

            parse = choose_preference_parser(spec, str(config.rl))
        elif spec.type is None:
            columns = _first_columns(spec, key=key)
            if columns is not None and "input_ids" not in columns:
                raise _missing_type(spec, columns, key=key)
        source = find_source(spec, key=key)
        found = False
        for file in source.files:
            first = next(read_records(file, key=key), None)
            if first is not None:
                place, record = first
                parse(record, place)
                found = True
        if source.kind == "files" and not found:
            what = f"nothing to train on in {spec.path}"
            why = "found no record in it, needed at least one"
            do = f"correct {key}.path, or remove the entry"
            raise AttnimgError(what, why=why, do=do, code="empty-dataset", key=f"{key}.path")
        (training if trains else testing).append(source)
    return training, testing


def load_documents(config: Config, tokenizer: Any) -> Documents:
    """Read, tokenize, shuffle and split everything the config names.

    The same config, files and tokenizer give the same documents in the same order, whatever
    dataset_num_proc is and whether dataset_prepared_path was used.

    Args:
        config: the validated run.
        tokenizer: a transformers tokenizer, special tokens already set.

    Raises:
        AttnimgError: the data are missing, broken, or not as the config describes them.
    """
    import datasets
    import numpy

    training, testing = find_sources(config)
    figures = list[SourceFigures]()
    warnings = dict.fromkeys(_warn_of_shared_files(training, testing))

    def load_all(sources: list[Source], need: StreamAmount | None = None) -> Dataset:
        parts = []
        for source in sources:
            part, counts, found = _load_part(source, config, tokenizer, need)
            parts.append(part.add_column("source", numpy.full(len(part), len(figures), "int32")))
            figures.append(counts)
            warnings.update(dict.fromkeys(found))
        if len(parts) > 1 and config.shuffle_before_merging_datasets:
            parts = [part.shuffle(seed=config.seed, keep_in_memory=True) for part in parts]
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    need = need_of(config)
    train = load_all(training, need)
    if config.shuffle_merged_datasets and need is None:
        # In memory: the library would cache the order on disk, and trust that file in later runs.
        train = train.shuffle(seed=config.seed, keep_in_memory=True)
    validation = load_all(testing) if testing else None
    if config.dataset_exact_deduplication:
        train = _without_copies(train, "training", warnings)
        validation = validation and _without_copies(validation, "evaluation", warnings)
    if config.val_set_size:
        train, validation = _split_validation(train, config)
    if validation is not None:
        warnings.update(dict.fromkeys(_warn_of_shared_documents(train, validation)))
    if trains_preferences(config):
        from attnimg.train.preferences.checks import preference_warnings

        warnings.update(dict.fromkeys(preference_warnings(train, validation, config)))
    return Documents(
        train=train.remove_columns(PLACES),
        validation=validation and validation.remove_columns(PLACES),
        figures=tuple(figures),
        warnings=tuple(warnings),
        train_places=train.select_columns(PLACES),
        validation_places=validation and validation.select_columns(PLACES),
    )


def load_evaluation_documents(config: Config, tokenizer: Any) -> dict[str, Documents]:
    """Load only what a run evaluates on: test_datasets, or the part that val_set_size splits off.

    Args:
        config: the validated run, with one of these keys.
        tokenizer: a transformers tokenizer, special tokens already set.

    Returns:
        The key of each source, "test_datasets[0]", or "val_set_size" -> its documents, as both
        `train` and `validation`. Copies that dataset_exact_deduplication removes may be in several
        sources: then all are one, "test_datasets".

    Raises:
        AttnimgError: as `load_documents` does.
    """
    if config.val_set_size or config.dataset_exact_deduplication:
        found = load_documents(config, tokenizer)
        key = "val_set_size" if config.val_set_size else "test_datasets"
        assert found.validation is not None
        return {key: replace(found, train=found.validation)}
    parts = {}
    for source in find_sources(config)[1]:
        part, figures, warnings = _load_part(source, config, tokenizer, None)
        parts[source.key] = Documents(
            train=part, validation=part, figures=(figures,), warnings=warnings
        )
    return parts


def _load_part(
    source: Source, config: Config, tokenizer: Any, need: StreamAmount | None
) -> tuple[Dataset, SourceFigures, tuple[str, ...]]:
    """Load the documents of one source, with its figures and warnings."""
    part, (figures, warnings) = load_source(source, config, tokenizer, need)
    if not figures.documents:
        raise _no_documents(source, figures)
    return part, figures, (*source.warnings, *warnings)


def _first_columns(spec: DatasetSpec, *, key: str) -> Collection[str] | None:
    """Return the columns of the first record of an entry; None where no local file has them."""
    columns: Collection[str] = ()
    with suppress(AttnimgError, StopIteration):
        source = find_source(spec, key=key)
        if not source.files:
            return None
        _, columns = next(read_records(source.files[0], key=key))
    return columns


def _missing_type(spec: DatasetSpec, columns: Collection[str], *, key: str) -> AttnimgError:
    """Return the error for an entry without a type; it suggests one that fits the first record."""
    suggested = next((type_ for name, type_ in TYPE_OF_COLUMN.items() if name in columns), None)
    what = f"{key} has no type"
    why = f"found no type for {spec.path}, needed one of {', '.join(COMMON_TYPES)}, or a prompt"
    do = f"set {key}.type: {suggested or ' or '.join(COMMON_TYPES)}"
    return AttnimgError(what, why=why, do=do, code="missing-key", key=f"{key}.type")


def _warn_of_shared_files(training: list[Source], testing: list[Source]) -> Iterator[str]:
    """Yield a warning for each source of test_datasets whose rows are also trained on."""
    for test in testing:
        for train in training:
            sliced = all("[" in (source.spec.split or "") for source in (train, test))
            shared = _data_names(train) & _data_names(test)
            if shared and not sliced:
                yield (
                    f"{train.key} and {test.key} both read {min(shared)}, so the evaluation uses "
                    "training data"
                )


def _warn_of_shared_documents(train: Dataset, validation: Dataset) -> Iterator[str]:
    """Yield a warning if documents of the evaluation are also trained on."""
    evaluated = list(_hash_documents(validation))
    shared = set(evaluated).intersection(_hash_documents(train))
    if count := sum(digest in shared for digest in evaluated):
        yield (
            f"{count:,} of {len(evaluated):,} evaluation documents are also in the training data, "
            "so the evaluation loss is too low: list each file and row once, and remove duplicate "
            "records"
        )


def _without_copies(documents: Dataset, kind: str, warnings: dict[str, None]) -> Dataset:
    """Return documents without those that have the tokens and labels of an earlier one.

    Source: axolotl 0.19.0, utils/data/utils.py, _deduplicate_dataset (2026-11-27)
    """
    seen, kept = set[bytes](), list[int]()
    names = [name for name in documents.column_names if name not in PLACES]
    columns = [_hash_documents(documents, column) for column in names]
    for index, row in enumerate(zip(*columns, strict=True)):
        if (digest := b"".join(row)) not in seen:
            seen.add(digest)
            kept.append(index)
    if removed := len(documents) - len(kept):
        warnings[
            f"dataset_exact_deduplication: {removed:,} of {len(documents):,} {kind} documents were "
            "copies of others, and were removed"
        ] = None
    return documents.select(kept)


def _hash_documents(documents: Dataset, column: str = "input_ids") -> Iterator[bytes]:
    """Yield a hash of the tokens, or of the labels, of each document."""
    for batch in documents.select_columns([column]).with_format("arrow").iter(1000):
        for ids in batch[column].combine_chunks().to_numpy(zero_copy_only=False):
            yield hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def _data_names(source: Source) -> set[str]:
    """Return the names of the files or splits that a source reads."""
    if source.kind == "files":
        return {str(file.path.resolve()) for file in source.files}
    spec = source.spec
    default = "test" if source.key.startswith("test_datasets") else "train"
    names = (part.partition("[")[0].strip() for part in (spec.split or default).split("+"))
    return {" ".join(filter(None, (spec.path, spec.name, name))) for name in names}


def _no_documents(source: Source, figures: SourceFigures) -> AttnimgError:
    """Return the error for a source without documents, with advice for most of its records."""
    longer = figures.too_long + figures.truncated + figures.split
    if source.spec.shards and not figures.records:
        do = f"set {source.key}.shards_idx: 0"
    elif figures.too_short > max(figures.empty, figures.without_loss):
        do = "remove min_sample_len"
    elif longer >= max(1, figures.empty):
        do = f"set sequence_len: {figures.longest}, the longest of them"
    elif figures.without_loss > figures.empty:
        do = (
            "set train_on_inputs: true, or list roles that the records have in "
            f"{source.key}.roles_to_train"
        )
    else:
        do = f"name the column with the text, or correct {source.key}.path"
    return AttnimgError(
        f"nothing to train on in {source.spec.path}",
        why=f"of {counted(figures.records, 'record')}: {figures.empty:,} without text, {longer:,} "
        f"longer than sequence_len {figures.sequence_len:,}, {figures.too_short:,} shorter than "
        f"min_sample_len, {figures.without_loss:,} without a trained token; needed "
        "at least one document",
        do=do,
        code="empty-dataset",
        key=f"{source.key}.path",
    )


def _split_validation(documents: Dataset, config: Config) -> tuple[Dataset, Dataset]:
    """Split off val_set_size documents for validation; return both parts, training first.

    Values up to 1 are a share of the documents, larger ones their number.

    Source: axolotl 0.18.0, schemas/config.py:1084, "1 = 100%", and utils/data/sft.py (2026-11-26).
    """
    import numpy

    size, total = config.val_set_size, len(documents)
    count = max(1, round(size * total)) if size <= 1 else round(size)
    if count >= total or (size > 1 and size != count):
        what = f"val_set_size {size:g} does not fit"
        why = f"found {counted(total, 'document')}; needed a share below 1, or a whole number "
        why += f"below {total:,}"
        do = "set val_set_size: 0.05, which is one document in twenty"
        do = do if total > 1 else "set val_set_size: 0, or add documents"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key="val_set_size")
    order = numpy.random.default_rng(config.seed).permutation(total)
    validation = sorted(order[:count].tolist())
    train = sorted(order[count:].tolist())
    return documents.select(train), documents.select(validation)


def sample_text(documents: Documents, tokenizer: Any) -> str:
    """Return the first document's text, with >>> and <<< around the tokens with loss.

    The text begins a little before the first token with loss. Control characters are escaped, so
    that data can't send commands to a terminal.
    """
    row = documents.train[0]
    if "parts" in row:
        from attnimg.train.preferences.data import sample_preference

        return sample_preference(row, tokenizer)
    ids, labels = row["input_ids"], row["labels"]
    first = next((index for index, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    start = max(0, min(first - SAMPLE_TOKENS // 4, len(ids) - SAMPLE_TOKENS))
    shown = list(zip(ids, labels, strict=True))[start : start + SAMPLE_TOKENS]
    pieces = []
    for trained, group in groupby(shown, key=lambda pair: pair[1] != IGNORE_INDEX):
        text = printable(tokenizer.decode([token for token, _ in group]))
        pieces.append(f">>>{text}<<<" if trained else text)
    before = "... " if start else ""
    after = " ..." if start + SAMPLE_TOKENS < len(ids) else ""
    text = f"{before}{''.join(pieces)}{after}".replace("\n", "\n    ")
    return f"first document (tokens with loss are between >>> and <<<):\n    {text}"

"""Prepare the data of a run as `train` does, without the model: tokenize, cache, pack, count.

tokenizer -> documents -> which documents share a row -> steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config, trains_preferences
from attnimg.selection.model_config import missing_folder
from attnimg.task import model_file
from attnimg.train.arguments import Schedule, plan_steps
from attnimg.train.check import check_data_keys
from attnimg.train.data import Documents, find_sources, load_documents
from attnimg.train.data.records import IGNORE_INDEX
from attnimg.train.distributed import world_size
from attnimg.train.environment import silence_libraries

if TYPE_CHECKING:
    from datasets import Dataset

    from attnimg.train.rows import PackedRows


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The documents for training or for evaluation, and how they are packed into rows.

    Attributes:
        documents: columns input_ids and labels.
        places: columns source and place, of the same documents.
        rows: the documents of each row; None if each document is a row.
        figures: documents, rows, tokens, trained_tokens, row_capacity and filled_share.
    """

    documents: Dataset
    places: Dataset
    rows: PackedRows | None
    figures: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessed:
    """The prepared data of a run.

    Attributes:
        config: the validated run.
        tokenizer: as `load_tokenizer` returns it.
        documents: as `load_documents` returns them.
        train: the training data.
        evaluation: the evaluation data; None without val_set_size and test_datasets.
        schedule: the optimizer steps of the run.
        world: number of processes that share the rows.
    """

    config: Config
    tokenizer: Any
    documents: Documents
    train: Split
    evaluation: Split | None
    schedule: Schedule
    world: int


def preprocess(config: Config, *, log: Callable[[str], None]) -> Preprocessed:
    """Tokenize and pack the data of a run, and cache it in dataset_prepared_path, if that is set.

    Args:
        config: the validated run.
        log: prints a line, for example which token is used for padding.

    Raises:
        AttnimgError: the tokenizer or the data can't be used (exit code 2).
    """
    check_data_keys(config)
    unknown = None if model_file(config) else missing_folder(config.base_model or "")
    if unknown is not None:
        raise unknown
    find_sources(config)
    silence_libraries()
    from attnimg.train.tokenizer import load_tokenizer  # imports transformers

    return prepare_data(config, load_tokenizer(config, log=log))


def prepare_data(config: Config, tokenizer: Any) -> Preprocessed:
    """Load the documents of a run, find out which of them share a row, and count.

    Raises:
        AttnimgError: the data can't be used.
    """
    documents = load_documents(config, tokenizer)
    train = _split(config, documents.train, documents.train_places, evaluation=False)
    evaluation = None
    if documents.validation:
        places = documents.validation_places
        evaluation = _split(config, documents.validation, places, evaluation=True)
    # Each process gets the same number of rows, as in `fit`.
    rows = train.figures["rows"]
    if world_size() > 1:
        rows += -rows % (config.micro_batch_size * world_size())
    return Preprocessed(
        config=config,
        tokenizer=tokenizer,
        documents=documents,
        train=train,
        evaluation=evaluation,
        schedule=plan_steps(
            config, rows=rows, world=world_size(), validation=evaluation is not None
        ),
        world=world_size(),
    )


def _split(config: Config, documents: Dataset, places: Any, *, evaluation: bool) -> Split:
    from attnimg.train.rows import is_packed, pack_documents, row_figures

    packed = is_packed(config, evaluation=evaluation)
    rows = pack_documents(documents, config) if packed else None
    figures = row_figures(documents, rows, config)
    figures["trained_tokens"] = count_trained(documents)
    if trains_preferences(config):
        figures["filled_share"] = None
        figures["tokens"] += count_repeated_prompts(documents)
    return Split(documents=documents, places=places, rows=rows, figures=figures)


def count_repeated_prompts(pairs: Dataset) -> int:
    """Return the tokens of the prompts of pairs, which are computed once more for each pair."""
    from attnimg.train.preferences.data import split_row

    rows = pairs.select_columns(["input_ids", "parts"])
    found = (split_row(row) for row in rows)
    return sum(len(row.prompt) * (len(row.answers) - 1) for row in found)


def count_trained(documents: Dataset) -> int:
    """Return the number of tokens with loss; a document's first token never has one."""
    import numpy

    count = 0
    for batch in documents.select_columns(["labels"]).with_format("arrow").iter(1000):
        labels = batch["labels"].combine_chunks()
        lengths = labels.value_lengths().to_numpy(zero_copy_only=False)
        trained = labels.flatten().to_numpy() != IGNORE_INDEX
        trained[numpy.cumsum(lengths) - lengths] = False
        count += int(trained.sum())
    return count

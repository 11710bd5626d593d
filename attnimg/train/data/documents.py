"""What the data step hands on: documents of tokens, and how many became of what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # the label of a token without loss (torch's cross_entropy, ignore_index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """What became of one entry of `datasets` or `test_datasets`.

    Attributes:
        key: the config key, "datasets[0]".
        path: what the config names.
        type: how its records became text.
        records: records read.
        documents: documents kept.
        tokens: tokens in them.
        trained_tokens: those that carry loss; a document's first token never does.
        empty: records dropped because they hold no text.
        too_long: records dropped because they exceed sequence_len.
        split: records cut into several documents.
        truncated: records cut off at sequence_len.
        without_loss: documents dropped because no token of theirs carries loss.
        longest: tokens of the longest record, before any limit.
        sequence_len: the longest document allowed, in tokens.
        content: SHA-256 of the documents' tokens and labels, in order.
        read: SHA-256 of the records, before a template writes them.
        reused: whether the documents were found in dataset_prepared_path.
    """

    key: str
    path: str
    type: str
    records: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    empty: int = 0
    too_long: int = 0
    split: int = 0
    truncated: int = 0
    without_loss: int = 0
    longest: int = 0
    sequence_len: int = 0
    content: str = ""
    read: str = ""
    reused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Everything to train on, tokenized; rows are documents of 1 to sequence_len tokens.

    Attributes:
        train: columns input_ids and labels, both list[int32] of equal length.
        validation: the same, None without val_set_size and test_datasets.
        figures: one a source, in the order of the config, test_datasets last.
        warnings: sentences on what a person should know before training.
    """

    train: Dataset
    validation: Dataset | None
    figures: tuple[SourceFigures, ...]
    warnings: tuple[str, ...] = ()


def sentence(figures: SourceFigures) -> str:
    """Return in one line what became of a source, naming only what happened."""
    parts = [f"{figures.records:,} records -> {figures.documents:,} documents"]
    longer = f"longer than {figures.sequence_len:,} tokens"
    for count, what in (
        (figures.empty, "empty ones dropped"),
        (figures.too_long, f"{longer} dropped"),
        (figures.split, f"{longer} split"),
        (figures.truncated, f"{longer} truncated"),
        (figures.without_loss, "without any trained token dropped"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    share = figures.trained_tokens / max(1, figures.tokens)
    parts.append(f"{figures.tokens:,} tokens, {share:.0%} with loss")
    reused = " (prepared earlier, reused)" if figures.reused else ""
    return f"{figures.path}: {', '.join(parts)}{reused}"

"""Documents become the rows a step trains on, and the collators that batch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.facts import RunContext
from attnimg.train.packing import NO_LOSS, PackedCollator, PaddedCollator, pack, pack_dataset

if TYPE_CHECKING:
    from datasets import Dataset
# The batch's own count of tokens and places, taken off again before the model sees the batch.
COUNTS = "attnimg_counts"

Batch = dict[str, Any]

Collator = Callable[[list[dict[str, Any]]], Batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one split, how to batch them, and what packing made of them.

    Attributes:
        dataset: columns input_ids, labels and, when packed, document_lengths.
        collate: examples -> batch, with the count of its tokens and places under COUNTS.
        figures: documents, rows, tokens, capacity and filled share, for the receipt.
        added: rows at the end that `even_out` added.
    """

    dataset: Dataset
    collate: CountingCollator
    figures: Mapping[str, object]
    added: int = 0


class CountingCollator:
    """Batch with another collator, and count tokens and the places they could have filled.

    Args:
        collate: the collator that makes the batch.
        capacity: tokens a row can hold when rows are packed; None counts the places of the batch.
        drops_added: whether rows that `even_out` added are left out of a batch with other rows.
    """

    def __init__(
        self,
        collate: PackedCollator | PaddedCollator,
        *,
        capacity: int | None,
        drops_added: bool = False,
    ) -> None:
        self.collate, self.capacity, self.drops_added = collate, capacity, drops_added

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """Make the batch; COUNTS is int64 (2,): tokens, places."""
        import torch

        counted = examples
        if self.drops_added:
            # Their padding would count in the auxiliary loss of a mixture of experts.
            counted = [row for row in examples if row["labels"] != [NO_LOSS]]
        batch: Batch = {**self.collate(counted or examples[:1])}
        tokens = sum(len(example["input_ids"]) for example in counted)
        places = batch["input_ids"].numel() if counted else 0
        if self.capacity:
            places = self.capacity * len(counted)
        batch[COUNTS] = torch.tensor([tokens, places])
        return batch

    def without_fixed_length(self) -> CountingCollator:
        """Return a collator that pads only to the longest row."""
        return CountingCollator(replace(self.collate, pad_to=None), capacity=None)


def make_rows(
    documents: Dataset, config: Config, *, packed: bool, context: RunContext, pad_token_id: int
) -> Rows:
    """Pack the documents, or leave each a row of its own.

    Args:
        documents: columns input_ids and labels, 1 to sequence_len tokens each.
        config: sequence_len, seed, pad_to_sequence_len and batch_flattening are read.
        packed: whether documents share rows.
        context: how the run calls its model; decides the layout of packed rows.
        pad_token_id: fills what a row has left.
    """
    fixed = config.sequence_len if config.pad_to_sequence_len else None
    flat = context.one_row and bool(config.batch_flattening)
    if packed:
        rows = pack(_lengths(documents), capacity=config.sequence_len, seed=config.seed)
        dataset, tokens, filled = pack_dataset(documents, rows), rows.tokens, rows.filled_share
    else:
        dataset, tokens = documents, int(_lengths(documents).sum())
        filled = tokens / (len(documents) * config.sequence_len)
    if packed or flat:
        collate: PackedCollator | PaddedCollator = PackedCollator(
            pad_token_id=pad_token_id,
            one_row=context.one_row,
            seq_idx=context.seq_idx,
            pad_to=fixed,
        )
    else:
        collate = PaddedCollator(pad_token_id=pad_token_id, pad_to=fixed)
    return Rows(
        dataset=dataset,
        collate=CountingCollator(collate, capacity=config.sequence_len if packed else None),
        figures={
            "packed": packed,
            "documents": len(documents),
            "rows": len(dataset),
            "tokens": tokens,
            "row_capacity": config.sequence_len,
            "filled_share": filled,
        },
    )


def even_out(rows: Rows, *, multiple: int, pad_token_id: int) -> Rows:
    """Add rows without loss until the count divides evenly.

    Several processes get equally many batches; accelerate would fill up with rows from the start,
    which would be trained, or count in an evaluation, twice.

    Args:
        rows: rows of one split.
        multiple: rows that all processes together take at once.
        pad_token_id: the one token of an added row.
    """
    from datasets import Dataset, concatenate_datasets

    missing = -len(rows.dataset) % multiple
    if not missing:
        return rows
    columns = {"input_ids": [pad_token_id], "labels": [NO_LOSS], "document_lengths": [1]}
    empty = Dataset.from_dict(
        {name: [columns[name]] * missing for name in rows.dataset.column_names},
        features=rows.dataset.features,
    )
    return replace(
        rows,
        dataset=concatenate_datasets([rows.dataset, empty]),
        collate=CountingCollator(
            rows.collate.collate, capacity=rows.collate.capacity, drops_added=True
        ),
        added=missing,
    )


def _lengths(documents: Dataset) -> Any:
    """Count the tokens of each document, int64 (documents,), without making Python lists."""
    import numpy as np

    column = documents.with_format("arrow")["input_ids"]
    chunks = column if hasattr(column, "combine_chunks") else column[:]
    return np.asarray(chunks.combine_chunks().value_lengths(), dtype=np.int64)


# Memory for the float32 logits of the batch; a backward pass holds about four such tensors.
LOGITS_MIB = 128

MOST_TOKENS = 512

MOST_DOCUMENTS = 16

# Rows that are searched for documents with a trained token.
ROWS = 64

# Tokens kept before the first trained token of a cut document.
LEAD = 8


def slice_tokens(vocabulary: int) -> int:
    """Return the largest number of tokens of the batch, padding included."""
    return max(32, min(MOST_TOKENS, LOGITS_MIB * 2**20 // (4 * vocabulary)))


def first_batch(rows: Rows, *, tokens: int) -> Batch | None:
    """Collate the first documents that have a trained token; None where there are none.

    Documents are cut to half of the tokens, so that a packed row holds two or more.

    Args:
        rows: the training rows.
        tokens: the largest number of tokens, padding included.
    """
    taken: list[dict[str, Any]] = []
    for document in _documents(rows):
        cut = _cut(document, tokens // 2)
        longest = max(len(item["input_ids"]) for item in [*taken, cut])
        if (len(taken) + 1) * longest > tokens or len(taken) == MOST_DOCUMENTS:
            break
        taken.append(cut)
    if not taken:
        return None
    if "document_lengths" in rows.dataset.column_names:
        taken = [
            {
                "input_ids": [token for item in taken for token in item["input_ids"]],
                "labels": [label for item in taken for label in item["labels"]],
                "document_lengths": [len(item["input_ids"]) for item in taken],
            }
        ]
    return rows.collate.without_fixed_length()(taken)


def _documents(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the documents of the first rows that have a trained token."""
    for index in range(min(ROWS, len(rows.dataset))):
        row = rows.dataset[index]
        begin = 0
        for length in row.get("document_lengths") or [len(row["input_ids"])]:
            part = slice(begin, begin + length)
            begin += length
            document = {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}
            if any(label != NO_LOSS for label in document["labels"][1:]):
                yield document


def _cut(document: dict[str, Any], length: int) -> dict[str, Any]:
    """Cut a document to `length` tokens, starting shortly before its first trained one."""
    first = next(i for i, label in enumerate(document["labels"]) if i and label != NO_LOSS)
    begin = max(0, min(first - LEAD, len(document["labels"]) - length))
    return {name: values[begin : begin + length] for name, values in document.items()}

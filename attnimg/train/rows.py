"""Build the rows that a run trains on, and batch them: collators, sampler, rows per process.

Batches have the arguments of a model's forward, and their own count of tokens under COUNTS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from numpy.typing import NDArray
from torch.utils.data import Sampler

from attnimg.config.schema import Config
from attnimg.facts import RunContext
from attnimg.layout import lay_out
from attnimg.train.packing import pack, pack_dataset

if TYPE_CHECKING:
    from datasets import Dataset

# torch.nn.CrossEntropyLoss(ignore_index) and so transformers' losses skip this label.
NO_LOSS = -100

# Key of a batch's numbers of tokens and token positions; removed before the model gets the batch.
COUNTS = "attnimg_counts"

Batch = dict[str, Any]

Collator = Callable[[list[dict[str, Any]]], Batch]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one split, how to batch them, and the statistics of packing.

    Attributes:
        dataset: columns input_ids, labels and, when packed, document_lengths.
        collate: examples -> batch, with its numbers of tokens and positions under COUNTS.
        figures: documents, rows, tokens, capacity and filled share, for the receipt.
        added: rows at the end that `even_out` added.
    """

    dataset: Dataset
    collate: CountingCollator
    figures: Mapping[str, object]
    added: int = 0


def make_rows(
    documents: Dataset, config: Config, *, packed: bool, context: RunContext, pad_token_id: int
) -> Rows:
    """Pack the documents, or make each a row of its own.

    Args:
        documents: columns input_ids and labels, 1 to sequence_len tokens each.
        config: sequence_len, seed, pad_to_sequence_len and batch_flattening are read.
        packed: whether documents share rows.
        context: how the run calls its model; decides the layout of packed rows.
        pad_token_id: the token that fills the rest of a row.
    """
    fixed = config.sequence_len if config.pad_to_sequence_len else None
    flat = context.padding_free and bool(config.batch_flattening)
    if packed:
        rows = pack(_lengths(documents), capacity=config.sequence_len, seed=config.seed)
        dataset, tokens, filled = pack_dataset(documents, rows), rows.tokens, rows.filled_share
    else:
        dataset, tokens = documents, int(_lengths(documents).sum())
        filled = tokens / (len(documents) * config.sequence_len)
    if packed or flat:
        collate: PackedCollator | PaddedCollator = PackedCollator(
            pad_token_id=pad_token_id,
            padding_free=context.padding_free,
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


def _lengths(documents: Dataset) -> Any:
    """Count the tokens of each document, int64 (documents,), without making Python lists."""
    column = documents.with_format("arrow")["input_ids"]
    chunks = column if hasattr(column, "combine_chunks") else column[:]
    return np.asarray(chunks.combine_chunks().value_lengths(), dtype=np.int64)


def even_out(rows: Rows, *, multiple: int, pad_token_id: int) -> Rows:
    """Add rows without loss until the number of rows is a multiple.

    All processes get the same number of batches; accelerate would fill up the last ones with rows
    from the start, which would then be trained on, or count in an evaluation, twice.

    Args:
        rows: rows of one split.
        multiple: number of rows in a batch of all processes together.
        pad_token_id: the single token of an added row.
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
        collate=replace(rows.collate, drops_added=True),
        added=missing,
    )


@dataclass(frozen=True, slots=True)
class CountingCollator:
    """Batch with another collator, and count tokens and token positions (padding included).

    Attributes:
        collate: the collator that makes the batch.
        capacity: tokens per row when rows are packed; None to count the positions of the batch.
        drops_added: whether rows that `even_out` added are left out of a batch with other rows.
    """

    collate: PackedCollator | PaddedCollator
    _: KW_ONLY
    capacity: int | None
    drops_added: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """Return the batch; COUNTS is int64 (2,): tokens, positions."""
        counted = examples
        if self.drops_added:
            # The padding of added rows would count in the auxiliary loss of a mixture of experts.
            counted = [row for row in examples if row["labels"] != [NO_LOSS]]
        batch: Batch = {**self.collate(counted or examples[:1])}
        tokens = sum(len(example["input_ids"]) for example in counted)
        places = batch["input_ids"].numel() if counted else 0
        if self.capacity:
            places = self.capacity * len(counted)
        batch[COUNTS] = torch.tensor([tokens, places])
        return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCollator:
    """Collate rows of packed documents so that no document can see another.

    transformers isolates documents by `position_ids`, and only without `attention_mask` and without
    a cache (masking_utils.find_packed_sequence_indices, 5.22.2): the batch has neither, and the
    caller passes use_cache=False.

    Attributes:
        pad_token_id: the token of padding, which is a document of its own and carries no loss.
        padding_free: True for kernels that take document boundaries (flash, varlen): rows flattened
            to (1, T), with cu_seq_lens_q/k and max_length_q/k. False for those that take a mask
            (eager, sdpa, flex): (B, S) and position_ids alone. They find the documents there; what
            reads boundaries instead (flash, linear attention) takes them for one row only.
        seq_idx: True for models whose short convolutions or scans need each token's document.
        pad_to: pad every row to a multiple of this many tokens; None to the longest row, and where
            padding_free is True not at all.
    """

    pad_token_id: int
    padding_free: bool
    seq_idx: bool
    pad_to: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor | int]:
        """Collate examples into the arguments of a model's forward.

        Args:
            examples: input_ids and labels, and document_lengths that sum to their length; an
                example without document_lengths is one document.

        Returns:
            input_ids, labels and position_ids, int64, (1, T) or (B, S); with padding_free also
            cu_seq_lens_q/k (int32, padding included) and max_length_q/k (int: a tensor would be
            read back from the GPU in every layer); with seq_idx also that, int32, shaped as
            input_ids. The first label of each document is -100: the token that predicts it belongs
            to the document before.
        """
        lengths = [
            example.get("document_lengths") or [len(example["input_ids"])] for example in examples
        ]
        for example, row in zip(examples, lengths, strict=True):
            assert sum(row) == len(example["input_ids"]), "document_lengths don't sum to the row"
        layout = lay_out(lengths, padding_free=self.padding_free, pad_to=self.pad_to)
        input_ids = _place(examples, "input_ids", layout.is_token, fill=self.pad_token_id)
        labels = _place(examples, "labels", layout.is_token, fill=NO_LOSS)
        labels[layout.position_ids == 0] = NO_LOSS
        batch: dict[str, torch.Tensor | int] = {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(layout.position_ids),
        }
        if self.padding_free:
            for side in ("q", "k"):
                batch[f"cu_seq_lens_{side}"] = torch.from_numpy(layout.cu_seq_lens)
                batch[f"max_length_{side}"] = layout.max_length
        if self.seq_idx:
            batch["seq_idx"] = torch.from_numpy(layout.seq_idx)
        return batch


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Collate documents one a row, padded on the right.

    Attributes:
        pad_token_id: the token of padding.
        pad_to: pad to a multiple of this many tokens; None to the longest document.
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples with input_ids and labels.

        Returns:
            input_ids, labels (-100 on padding) and attention_mask (0 on padding), int64, (B, S).
        """
        lengths = [[len(example["input_ids"])] for example in examples]
        is_token = lay_out(lengths, padding_free=False, pad_to=self.pad_to).is_token
        batch = {
            "input_ids": _place(examples, "input_ids", is_token, fill=self.pad_token_id),
            "labels": _place(examples, "labels", is_token, fill=NO_LOSS),
            "attention_mask": is_token.astype(np.int64),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _place(
    examples: Sequence[Mapping[str, Any]], column: str, is_token: NDArray[np.bool_], *, fill: int
) -> NDArray[np.int64]:
    """Place one column's values on the tokens, row after row, and `fill` on the padding."""
    placed = np.full(is_token.shape, fill, dtype=np.int64)
    placed[is_token] = np.concatenate([np.asarray(example[column]) for example in examples])
    return placed


class OnceAnEpoch(Sampler[int]):  # type: ignore[misc]  # torch's types are not followed
    """Sample the rows in the order of a single process, with the added rows at the end of an epoch.

    accelerate would fill up the last batches with rows from the start of the epoch, which would be
    trained twice.

    Args:
        rows: number of rows to train on.
        added: number of rows without loss after them, from `even_out`.
        seed: seed of the order, used as in accelerate's own sampler.
    """

    def __init__(self, *, rows: int, added: int, seed: int) -> None:
        self.order = SeedableRandomSampler(range(rows), data_seed=seed)
        self.rows, self.added = rows, added

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch; the next epoch has another order."""
        yield from self.order
        yield from range(self.rows, self.rows + self.added)

    def __len__(self) -> int:
        """Return the number of rows, the added ones included."""
        return self.rows + self.added

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order is drawn next."""
        self.order.set_epoch(epoch)


# Memory for the float32 logits of the batch; a backward pass needs about four such tensors.
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
    # Padded to the longest document only.
    return CountingCollator(replace(rows.collate.collate, pad_to=None), capacity=None)(taken)


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

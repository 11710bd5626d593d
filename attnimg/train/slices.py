"""Build a small batch from the first training rows, for a check before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnimg.train.collate import NO_LOSS
from attnimg.train.rows import Batch, Rows

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

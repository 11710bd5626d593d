"""Compute the layout of packed documents in a batch: positions, boundaries and padding.

The collator uses it for training batches, and the isolation check for its test batch, so that both
have the same layout. It is a module of its own because steps don't import one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedLayout:
    """The layout of one batch of B rows of S tokens, or of one row (1, B * S) when flattened.

    The padding of a row counts as a document of its own.

    Attributes:
        position_ids: start at 0 in every document; (B, S) int64.
        is_token: False on padding; (B, S) bool.
        cu_seq_lens: where documents begin and end in the flattened batch; (documents + 1,) int32.
        max_length: tokens in the longest document.
        seq_idx: index of each token's document within its row, from 0; (B, S) int32.
    """

    position_ids: NDArray[np.int64]
    is_token: NDArray[np.bool_]
    cu_seq_lens: NDArray[np.int32]
    max_length: int
    seq_idx: NDArray[np.int32]


def lay_out(
    document_lengths: Sequence[Sequence[int]], *, padding_free: bool, pad_to: int | None = None
) -> PackedLayout:
    """Return the layout of rows of documents.

    Args:
        document_lengths: tokens of each document, by row; each row has at least one token.
        padding_free: flatten to (1, T). Rows then need not be equally long, so nothing is padded
            without `pad_to`.
        pad_to: pad every row to a multiple of it, for static shapes. None pads to the longest row.
    """
    row_lengths = [sum(lengths) for lengths in document_lengths]
    assert row_lengths, "a batch without rows"
    assert all(row_lengths), "a row without tokens"
    if padding_free and pad_to is None:
        widths = row_lengths
    else:
        step = pad_to or 1
        widths = [-(-max(row_lengths) // step) * step] * len(row_lengths)
    rows = [
        [*lengths, width - length] if width > length else [*lengths]
        for lengths, length, width in zip(document_lengths, row_lengths, widths, strict=True)
    ]
    lengths_D = np.array([length for row in rows for length in row if length], dtype=np.int64)
    ends_D = np.cumsum(lengths_D)
    position_T = np.arange(ends_D[-1]) - np.repeat(ends_D - lengths_D, lengths_D)
    is_token_T = np.concatenate(
        [np.arange(width) < length for width, length in zip(widths, row_lengths, strict=True)]
    )
    shape = (1, -1) if padding_free else (len(rows), -1)
    document_BS = np.repeat(np.arange(len(lengths_D), dtype=np.int32), lengths_D).reshape(shape)
    return PackedLayout(
        position_ids=position_T.reshape(shape),
        is_token=is_token_T.reshape(shape),
        cu_seq_lens=np.concatenate(([0], ends_D)).astype(np.int32),
        max_length=int(lengths_D.max()),
        seq_idx=document_BS - document_BS[:, :1],
    )

"""Make batches of examples: packed, where documents share rows, or padded, one document a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnimg.layout import lay_out

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]

# torch.nn.CrossEntropyLoss(ignore_index) and so transformers' losses skip this label.
NO_LOSS = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCollator:
    """Collate rows of packed documents so that no document can see another.

    transformers isolates documents by `position_ids` alone, and only without `attention_mask` and
    without a cache (masking_utils.find_packed_sequence_indices, 5.22.2): this emits neither, and
    the caller passes use_cache=False.

    Attributes:
        pad_token_id: stands on padding, which is a document of its own and bears no loss.
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

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor | int]:
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
        import torch

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
        pad_token_id: stands on padding.
        pad_to: pad to a multiple of this many tokens; None to the longest document.
    """

    pad_token_id: int
    pad_to: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Collate examples with input_ids and labels.

        Returns:
            input_ids, labels (-100 on padding) and attention_mask (0 on padding), int64, (B, S).
        """
        import torch

        lengths = [[len(example["input_ids"])] for example in examples]
        is_token = lay_out(lengths, padding_free=False, pad_to=self.pad_to).is_token
        return {
            "input_ids": torch.from_numpy(
                _place(examples, "input_ids", is_token, fill=self.pad_token_id)
            ),
            "labels": torch.from_numpy(_place(examples, "labels", is_token, fill=NO_LOSS)),
            "attention_mask": torch.from_numpy(is_token.astype(np.int64)),
        }


def _place(
    examples: Sequence[Example], column: str, is_token: NDArray[np.bool_], *, fill: int
) -> NDArray[np.int64]:
    """Place one column's values on the tokens, row after row, and `fill` on the padding."""
    placed = np.full(is_token.shape, fill, dtype=np.int64)
    placed[is_token] = np.concatenate([np.asarray(example[column]) for example in examples])
    return placed

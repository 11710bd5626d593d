"""Batch the rows of preference data with TRL's collators, and count their tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnimg.config.schema import Config
from attnimg.train.preferences.data import Row, split_row
from attnimg.train.rows import COUNTS, NO_LOSS, Batch, Rows, row_lengths

if TYPE_CHECKING:
    from datasets import Dataset

# Collates rows into a batch of TRL's trainer.
Collate = Callable[[list[Row]], Batch]


class PreferenceCollator:
    """Batch rows with a collator of TRL, and count their tokens and positions, padding included.

    Args:
        collate: TRL's collator.
        sequences: keys of the batch's attention masks.
    """

    def __init__(self, collate: Collate, sequences: tuple[str, ...]) -> None:
        self.collate, self.sequences = collate, sequences

    def __call__(self, examples: list[dict[str, Any]]) -> Batch:
        """Return the batch; COUNTS is int64 (2,): tokens, positions."""
        batch = self.collate([split_row(example) for example in examples])
        masks = [batch[name] for name in self.sequences]
        counts = [sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)]
        batch[COUNTS] = torch.tensor(counts)
        return batch


def make_preference_rows(dataset: Dataset, config: Config, *, pad_token_id: int) -> Rows:
    """Return the rows of one split with their collator.

    Args:
        dataset: as `prepare_preferences` wrote it.
        config: rl and sequence_len are read.
        pad_token_id: the token of padding.
    """
    collators = {"kto": _kto_collator, "orpo": _orpo_collator}
    collate, sequences = collators.get(str(config.rl), _dpo_collator)(pad_token_id)
    tokens = int(row_lengths(dataset).sum())
    return Rows(
        dataset=dataset,
        collate=PreferenceCollator(collate, sequences),
        figures={
            "packed": False,
            "documents": len(dataset),
            "rows": len(dataset),
            "tokens": tokens,
            "row_capacity": config.sequence_len,
            "filled_share": None,
        },
    )


def _dpo_collator(pad_token_id: int) -> tuple[Collate, tuple[str, ...]]:
    """Return TRL's collator of DPO: a batch has the preferred answers, then the rejected ones."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=pad_token_id)

    def collate(rows: list[Row]) -> Batch:
        return dict(
            collator(
                [
                    {
                        "prompt_ids": row.prompt,
                        "chosen_ids": row.answers[0],
                        "rejected_ids": row.answers[1],
                    }
                    for row in rows
                ]
            )
        )

    return collate, ("attention_mask",)


def _kto_collator(pad_token_id: int) -> tuple[Collate, tuple[str, ...]]:
    """Return TRL's collator of KTO, with each prompt's answer and the answer of the previous row.

    The first row of a batch gets the answer of the last row. TRL does this when it prepares the
    dataset. Source: trl 1.16.0, kto_trainer.py, add_kl_completion_ids (2026-11-27)
    """
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collator = DataCollatorForUnpairedPreference(pad_token_id=pad_token_id)

    def collate(rows: list[Row]) -> Batch:
        return dict(
            collator(
                [
                    {
                        "prompt_ids": row.prompt,
                        "completion_ids": row.answers[0],
                        "KL_completion_ids": before.answers[0],
                        "label": row.desirable,
                    }
                    for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True)
                ]
            )
        )

    return collate, ("attention_mask",)


def _orpo_collator(pad_token_id: int) -> tuple[Collate, tuple[str, ...]]:
    """Return TRL's collator of ORPO: preferred and rejected answers in separate tensors."""
    from trl.experimental.utils import DPODataCollatorWithPadding

    collator = DPODataCollatorWithPadding(pad_token_id=pad_token_id)

    def collate(rows: list[Row]) -> Batch:
        features = []
        for row in rows:
            feature: dict[str, list[int]] = {}
            for name, answer in zip(("chosen", "rejected"), row.answers, strict=True):
                ids = row.prompt + answer
                feature[f"{name}_input_ids"] = ids
                feature[f"{name}_attention_mask"] = [1] * len(ids)
                feature[f"{name}_labels"] = [NO_LOSS] * len(row.prompt) + answer
            features.append(feature)
        return dict(collator(features))

    return collate, ("chosen_attention_mask", "rejected_attention_mask")

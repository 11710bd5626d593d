"""Each row is drawn once an epoch, in the order of one process; added rows come last."""

from __future__ import annotations

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import BatchSampler

from attnimg.train.rows import (
    COUNTS,
    NO_LOSS,
    CountingCollator,
    EpochSampler,
    PackedCollator,
    PaddedCollator,
    Rows,
    pad_rows_to_multiple,
)


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(("rows", "batch", "world"), [(9, 1, 8), (9, 2, 2), (5, 3, 2), (1, 4, 3)])
def test_processes_draw_each_row_once(rows: int, batch: int, world: int, epoch: int) -> None:
    alone = SeedableRandomSampler(range(rows), data_seed=42)
    sampler = EpochSampler(rows=rows, added=-rows % (batch * world), seed=42)
    drawn = []
    for rank in range(world):
        alone.set_epoch(epoch)
        sampler.set_epoch(epoch)
        drawn.append([*BatchSamplerShard(BatchSampler(sampler, batch, False), world, rank)])
    assert len({tuple(map(len, batches)) for batches in drawn}) == 1, "as many rows each"
    in_order = [row for turn in zip(*drawn, strict=True) for found in turn for row in found]
    assert in_order == [*alone, *range(rows, len(sampler))]


@pytest.mark.parametrize("packed", [True, False])
def test_added_rows_count_no_tokens_and_have_no_loss(packed: bool) -> None:
    columns = {"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]], "document_lengths": [[2, 1]]}
    collate = PackedCollator(pad_token_id=0, padding_free=False, seq_idx=False)
    made = Rows(
        dataset=Dataset.from_dict(columns if packed else dict(list(columns.items())[:2])),
        collate=CountingCollator(
            collate if packed else PaddedCollator(pad_token_id=0), capacity=8 if packed else None
        ),
        figures={"rows": 1},
    )
    evened = pad_rows_to_multiple(made, multiple=4, pad_token_id=0)
    assert (len(evened.dataset), evened.added, evened.figures["rows"]) == (4, 3, 1)
    mixed = evened.collate([evened.dataset[0], evened.dataset[1]])
    assert (mixed["input_ids"].tolist(), mixed[COUNTS].tolist()) == (
        [[5, 6, 7]], [3, 8 if packed else 3],
    )  # fmt: skip
    alone = evened.collate([evened.dataset[2], evened.dataset[3]])
    assert (alone["labels"].tolist(), alone[COUNTS].tolist()) == ([[NO_LOSS]], [0, 0])
    whole = pad_rows_to_multiple(made, multiple=1, pad_token_id=0)
    assert whole is made
    assert whole.added == 0

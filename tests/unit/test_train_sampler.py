"""Each row is drawn once an epoch, in the order of one process; added rows come last."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import BatchSampler

from attnimg.train.rows import (
    COUNTS,
    NO_LOSS,
    CountingCollator,
    EpochSampler,
    LengthGroupedOrder,
    PackedCollator,
    PaddedCollator,
    Rows,
    pad_rows_to_multiple,
)

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, losses, make_model, run


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(("rows", "batch", "world"), [(9, 1, 8), (9, 2, 2), (5, 3, 2), (1, 4, 3)])
def test_processes_draw_each_row_once(rows: int, batch: int, world: int, epoch: int) -> None:
    alone = SeedableRandomSampler(range(rows), data_seed=42)
    order = SeedableRandomSampler(range(rows), data_seed=42)
    sampler = EpochSampler(order, rows=rows, added=-rows % (batch * world))
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


def test_rows_of_similar_lengths_are_together() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 100) for _ in range(203)]
    order = LengthGroupedOrder(lengths, together=4, seed=7)
    first, second = [*order], [*order]
    assert first != second, "the next epoch has another order"
    assert sorted(first) == sorted(second) == [*range(203)]
    order.set_epoch(0)
    assert [*order] == first
    assert [*LengthGroupedOrder(lengths, together=4, seed=8)] != first

    def padding(rows: list[int]) -> int:
        batches = [[lengths[row] for row in rows[at : at + 4]] for at in range(0, 203, 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(first) < padding([*range(203)]) / 4


def test_a_run_groups_by_length_and_resumes_in_the_same_order(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    keys: dict[str, Any] = {"sample_packing": False, "micro_batch_size": 8, "max_steps": 20,
                            "learning_rate": 1e-4}  # fmt: skip
    for grouped in (False, True):
        run(tmp_path, tmp_path / str(grouped), group_by_length=grouped, save_steps=9, **keys)
    filled = {name: sum(line["filled"] for line in lines(tmp_path / name)) / 20
              for name in ("False", "True")}  # fmt: skip
    assert filled["True"] > filled["False"] + 0.1
    # The second epoch begins at step 15.
    again = {"resume_from_checkpoint": str(tmp_path / "True/checkpoint-18"), **keys}
    run(tmp_path, tmp_path / "resumed", group_by_length=True, save_steps=9, **again)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "True")[18:]

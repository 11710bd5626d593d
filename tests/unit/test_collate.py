"""Collation: what a model is shown, to the token, and that real models keep documents apart."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from attnimg.train.rows import PackedCollator, PaddedCollator

TWO_AND_THREE = {
    "input_ids": [11, 12, 21, 22, 23],
    "labels": [11, 12, 21, 22, 23],
    "document_lengths": [2, 3],
}
ONE_OF_FOUR = {"input_ids": [31, 32, 33, 34], "labels": [-100, -100, 33, 34]}


def lists(batch):
    return {name: x.tolist() if hasattr(x, "tolist") else x for name, x in batch.items()}


@pytest.mark.parametrize(
    ("padding_free", "expected"),
    [
        pytest.param(True, [[0, 0, 1, 1, 1, 2]], id="one row"),
        pytest.param(False, [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], id="rows, padding last"),
    ],
)
def test_seq_idx_numbers_the_documents_of_a_row(padding_free, expected):
    collate = PackedCollator(pad_token_id=9, padding_free=padding_free, seq_idx=True)
    one = {"input_ids": [1], "labels": [1], "document_lengths": [1]}
    found = collate([TWO_AND_THREE, one])["seq_idx"]
    assert found.tolist() == expected
    assert found.dtype is torch.int32


@pytest.mark.parametrize(
    ("examples", "settings", "batch"),
    [
        pytest.param(
            [TWO_AND_THREE],
            {"padding_free": True},
            {
                "input_ids": [[11, 12, 21, 22, 23]],
                "labels": [[-100, 12, -100, 22, 23]],
                "position_ids": [[0, 1, 0, 1, 2]],
                "cu_seq_lens_q": [0, 2, 5],
                "cu_seq_lens_k": [0, 2, 5],
                "max_length_q": 3,
                "max_length_k": 3,
            },
            id="a row of two documents comes with their boundaries",
        ),
        pytest.param(
            [TWO_AND_THREE, ONE_OF_FOUR],
            {"padding_free": True},
            {
                "input_ids": [[11, 12, 21, 22, 23, 31, 32, 33, 34]],
                "labels": [[-100, 12, -100, 22, 23, -100, -100, 33, 34]],
                "position_ids": [[0, 1, 0, 1, 2, 0, 1, 2, 3]],
                "cu_seq_lens_q": [0, 2, 5, 9],
                "cu_seq_lens_k": [0, 2, 5, 9],
                "max_length_q": 4,
                "max_length_k": 4,
            },
            id="rows are flattened to one, and one without lengths is one document",
        ),
        pytest.param(
            [TWO_AND_THREE, ONE_OF_FOUR],
            {"padding_free": True, "pad_to": 6},
            {
                "input_ids": [[11, 12, 21, 22, 23, 9, 31, 32, 33, 34, 9, 9]],
                "labels": [[-100, 12, -100, 22, 23, -100, -100, -100, 33, 34, -100, -100]],
                "position_ids": [[0, 1, 0, 1, 2, 0, 0, 1, 2, 3, 0, 1]],
                "cu_seq_lens_q": [0, 2, 5, 6, 10, 12],
                "cu_seq_lens_k": [0, 2, 5, 6, 10, 12],
                "max_length_q": 4,
                "max_length_k": 4,
            },
            id="the padding of each row is a document without loss",
        ),
        pytest.param(
            [TWO_AND_THREE, ONE_OF_FOUR],
            {"padding_free": False},
            {
                "input_ids": [[11, 12, 21, 22, 23], [31, 32, 33, 34, 9]],
                "labels": [[-100, 12, -100, 22, 23], [-100, -100, 33, 34, -100]],
                "position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 3, 0]],
            },
            id="for masked backends rows stay rows, padded to the longest",
        ),
        pytest.param(
            [ONE_OF_FOUR],
            {"padding_free": False, "pad_to": 6},
            {
                "input_ids": [[31, 32, 33, 34, 9, 9]],
                "labels": [[-100, -100, 33, 34, -100, -100]],
                "position_ids": [[0, 1, 2, 3, 0, 1]],
            },
            id="a row is padded to pad_to",
        ),
        pytest.param(
            [TWO_AND_THREE],
            {"padding_free": False, "pad_to": 4},
            {
                "input_ids": [[11, 12, 21, 22, 23, 9, 9, 9]],
                "labels": [[-100, 12, -100, 22, 23, -100, -100, -100]],
                "position_ids": [[0, 1, 0, 1, 2, 0, 1, 2]],
            },
            id="a row longer than pad_to is padded to a multiple of it",
        ),
    ],
)
def test_packed_rows_become(examples, settings, batch):
    assert lists(PackedCollator(pad_token_id=9, seq_idx=False, **settings)(examples)) == batch


@pytest.mark.parametrize(
    ("pad_to", "batch"),
    [
        pytest.param(
            None,
            {
                "input_ids": [[11, 12, 21, 22, 23], [31, 32, 33, 34, 9]],
                "labels": [[11, 12, 21, 22, 23], [-100, -100, 33, 34, -100]],
                "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]],
            },
            id="padded to the longest",
        ),
        pytest.param(
            6,
            {
                "input_ids": [[11, 12, 21, 22, 23, 9], [31, 32, 33, 34, 9, 9]],
                "labels": [[11, 12, 21, 22, 23, -100], [-100, -100, 33, 34, -100, -100]],
                "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]],
            },
            id="padded to pad_to",
        ),
    ],
)
def test_unpacked_documents_become(pad_to, batch):
    assert (
        lists(PaddedCollator(pad_token_id=9, pad_to=pad_to)([TWO_AND_THREE, ONE_OF_FOUR])) == batch
    )


def test_dtypes_are_what_kernels_read():
    batch = PackedCollator(pad_token_id=9, seq_idx=False, padding_free=True)([TWO_AND_THREE])
    assert {name: x.dtype for name, x in batch.items() if isinstance(x, torch.Tensor)} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "cu_seq_lens_q": torch.int32,
        "cu_seq_lens_k": torch.int32,
    }
    assert type(batch["max_length_q"]) is int


def test_document_lengths_that_do_not_sum_to_the_row_are_a_mistake():
    with pytest.raises(AssertionError):
        PackedCollator(pad_token_id=9, seq_idx=False, padding_free=True)(
            [{**TWO_AND_THREE, "document_lengths": [2, 2]}]
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"padding_free": False}, id="rows by mask"),
        pytest.param({"padding_free": False, "pad_to": 64}, id="rows by mask, padded"),
        pytest.param({"padding_free": True}, id="one row"),
        pytest.param({"padding_free": True, "pad_to": 64}, id="one row, padded"),
    ],
)
def test_a_batch_has_the_loss_of_its_documents_apart(model_type, implementation, settings):
    model = tiny_model(model_type, implementation).eval()
    draw = torch.Generator().manual_seed(0)
    rows = [[13, 21, 1], [30], [5, 2, 9, 8]]
    tokens = [torch.randint(3, 128, (sum(row),), generator=draw).tolist() for row in rows]
    examples = [
        {"input_ids": ids, "labels": ids, "document_lengths": row}
        for ids, row in zip(tokens, rows, strict=True)
    ]
    with torch.no_grad():
        batch = PackedCollator(pad_token_id=0, seq_idx=False, **settings)(examples)
        together = model(**batch, use_cache=False).loss
        losses, trained = 0.0, 0
        for ids, row in zip(tokens, rows, strict=True):
            for document in torch.tensor(ids).split(row):
                if len(document) > 1:
                    alone = model(input_ids=document[None], labels=document[None]).loss
                    losses += alone * (len(document) - 1)
                    trained += len(document) - 1
    assert together.item() == pytest.approx((losses / trained).item(), abs=2e-6)

"""Packing: every document once, rows never too long, full, shuffled, and fast."""

from __future__ import annotations

import time

import numpy as np
import pytest

from attnimg.errors import AttnimgError
from attnimg.train.rows import pack, pack_dataset

COUNT = 100_000
CAPACITY = 2048


def lognormal(seed, count=COUNT):
    drawn = np.random.default_rng(seed).lognormal(6.0, 1.0, count).astype(int)
    return np.clip(drawn, 1, CAPACITY)


def uniform(seed, count=COUNT):
    return np.random.default_rng(seed).integers(16, CAPACITY + 1, count)


def row_sums(lengths, rows):
    return np.add.reduceat(np.asarray(lengths)[rows.documents], rows.offsets[:-1])


@pytest.mark.parametrize(
    ("lengths", "capacity", "count"),
    [
        pytest.param([], 5, 0, id="no documents make no rows"),
        pytest.param([3], 5, 1, id="one document makes one row"),
        pytest.param([5] * 4, 5, 4, id="documents of a row's length stand alone"),
        pytest.param([1] * 7, 3, 3, id="documents of one token fill rows"),
        pytest.param([1] * 7, 1, 7, id="rows of one token hold one document"),
        pytest.param([3] * 5, 5, 5, id="documents above half a row stand alone"),
        pytest.param([6, 5, 5, 4], 10, 2, id="lengths that match up waste nothing"),
        pytest.param([5, 4, 3, 3, 3, 2], 10, 2, id="a pair that ends the row exactly is preferred"),
        pytest.param(
            [44, 24, 24, 22, 21, 17, 8, 8, 6, 6], 60, 3, id="the bound is met where it can be"
        ),
        pytest.param(np.ones(1_000_000, int), 1 << 20, 1, id="a million tokens share one row"),
        pytest.param(lognormal(3), CAPACITY, None, id="log-normal lengths"),
        pytest.param(uniform(3), CAPACITY, None, id="uniform lengths"),
        pytest.param(lognormal(4, 1_000_000), CAPACITY, None, id="a million documents"),
        pytest.param(lognormal(5, 20_000), 131_072, None, id="rows of 131072 tokens"),
    ],
)
def test_each_document_stands_in_one_row_and_no_row_is_too_long(lengths, capacity, count):
    rows = pack(lengths, capacity=capacity, seed=7)
    assert np.array_equal(np.sort(rows.documents), np.arange(len(lengths)))
    assert rows.offsets[0] == 0
    assert rows.offsets[-1] == len(lengths)
    assert (np.diff(rows.offsets) > 0).all()
    if len(lengths):
        assert row_sums(lengths, rows).max() <= capacity
        assert rows.filled_share == pytest.approx(np.sum(lengths) / (rows.count * capacity))
    assert rows.tokens == np.sum(lengths)
    assert count is None or rows.count == count


def first_fit_decreasing(lengths, capacity):
    spaces = []
    for length in sorted(lengths, reverse=True):
        fits = next((r for r, space in enumerate(spaces) if space >= length), None)
        if fits is None:
            spaces.append(capacity - length)
        else:
            spaces[fits] -= length
    return len(spaces)


@pytest.mark.parametrize("seed", range(50))
def test_first_fit_decreasing_never_needs_fewer_rows(seed):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(1, 40))
    lengths = draw.integers(1, capacity + 1, int(draw.integers(1, 60)))
    rows = pack(lengths, capacity=capacity, seed=seed)
    assert np.array_equal(np.sort(rows.documents), np.arange(len(lengths)))
    assert row_sums(lengths, rows).max() <= capacity
    assert rows.count <= first_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("draw", "filled"),
    [
        pytest.param(lognormal, 0.999, id="log-normal"),
        pytest.param(uniform, 0.997, id="uniform"),
    ],
)
def test_rows_of_100k_documents_are_full_within_a_fifth_of_a_second(draw, filled, seed):
    lengths = draw(seed)
    seconds = []
    for _ in range(3):
        began = time.process_time()
        rows = pack(lengths, capacity=CAPACITY, seed=seed)
        seconds.append(time.process_time() - began)
    assert rows.filled_share >= filled
    assert min(seconds) < 0.2


def test_the_seed_decides_everything():
    lengths = uniform(0, 2000)
    first, again, other = (pack(lengths, capacity=CAPACITY, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.documents, again.documents)
    assert np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.documents, other.documents)
    assert first.count == other.count


def test_neighbouring_rows_do_not_hold_equal_lengths():
    lengths = uniform(0)
    rows = pack(lengths, capacity=CAPACITY, seed=0)
    longest = np.maximum.reduceat(lengths[rows.documents], rows.offsets[:-1]).astype(float)
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.02


def test_documents_of_a_row_are_in_no_order_of_length():
    lengths = lognormal(0)
    rows = pack(lengths, capacity=CAPACITY, seed=0)
    in_rows = lengths[rows.documents]
    same_row = np.ones(len(in_rows) - 1, dtype=bool)
    same_row[rows.offsets[1:-1] - 1] = False
    falling = np.diff(in_rows)[same_row] < 0
    rising = np.diff(in_rows)[same_row] > 0
    assert falling.sum() / rising.sum() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        pytest.param([3, 9, 2], "document 1 has 9 tokens", id="a document longer than a row"),
        pytest.param([3, 2, 0], "document 2 has 0 tokens", id="an empty document"),
        pytest.param([3, -1], "document 1 has -1 tokens", id="a negative length"),
    ],
)
def test_a_document_that_fits_no_row_is_refused_by_number(lengths, found):
    with pytest.raises(AttnimgError) as caught:
        pack(lengths, capacity=8, seed=0)
    assert found in caught.value.why
    assert caught.value.code == "bad-data"


def documents_of(lengths):
    import pyarrow as pa
    from datasets import Dataset

    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    tokens = np.arange(offsets[-1], dtype=np.int64)
    return Dataset(
        pa.table(
            {
                "input_ids": pa.ListArray.from_arrays(offsets, tokens),
                "labels": pa.ListArray.from_arrays(offsets, -tokens),
                "source": ["kjv"] * len(lengths),
            }
        )
    )


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(lambda documents: documents, id="of a whole dataset"),
        pytest.param(lambda documents: documents.shuffle(seed=3), id="of a shuffled dataset"),
        pytest.param(lambda documents: documents.select(range(5, 900)), id="of a slice"),
    ],
)
def test_rows_hold_the_documents_tokens_and_labels(choose):
    documents = choose(documents_of(uniform(0, 3000)))
    lengths = [len(ids) for ids in documents["input_ids"]]
    rows = pack(lengths, capacity=CAPACITY, seed=0)
    packed = pack_dataset(documents, rows)
    assert packed.column_names == ["input_ids", "labels", "document_lengths"]
    assert len(packed) == rows.count
    for r in (0, 1, rows.count // 2, rows.count - 1):
        chosen = [documents[int(i)] for i in rows.documents[rows.offsets[r] : rows.offsets[r + 1]]]
        assert packed[r] == {
            "input_ids": [token for document in chosen for token in document["input_ids"]],
            "labels": [label for document in chosen for label in document["labels"]],
            "document_lengths": [len(document["input_ids"]) for document in chosen],
        }


def test_no_documents_make_a_dataset_without_rows():
    packed = pack_dataset(documents_of([3]).select([]), pack([], capacity=4, seed=0))
    assert len(packed) == 0
    assert packed.column_names == ["input_ids", "labels", "document_lengths"]


def test_labels_that_do_not_match_the_tokens_are_refused():
    from datasets import Dataset

    documents = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3, 4]]})
    with pytest.raises(AttnimgError, match="different numbers of labels and tokens"):
        pack_dataset(documents, pack([2, 1], capacity=4, seed=0))


def test_100k_documents_become_a_dataset_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, COUNT).astype(int), 1, CAPACITY)
    documents = documents_of(lengths)
    rows = pack(lengths, capacity=CAPACITY, seed=0)
    began = time.process_time()
    packed = pack_dataset(documents, rows)
    assert time.process_time() - began < 5
    assert len(packed) == rows.count

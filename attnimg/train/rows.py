"""Pack documents into rows, and batch the rows: packing, collators, sampler, rows per process.

Batches have the arguments of a model's forward, and their own count of tokens under COUNTS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.layout import lay_out
from attnimg.run_facts import RunContext

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# torch.nn.CrossEntropyLoss(ignore_index) and so transformers' losses skip this label.
NO_LOSS = -100

# Key of a batch's numbers of tokens and token positions; removed before the model gets the batch.
COUNTS = "attnimg_counts"

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of one split, how to batch them, and the statistics of packing.

    Attributes:
        dataset: columns input_ids, labels and, when packed, document_lengths; or preference data.
        collate: examples -> batch, with its numbers of tokens and positions under COUNTS.
        figures: documents, rows, tokens, capacity and filled share, for the receipt.
        added: rows at the end that `pad_rows_to_multiple` added.
    """

    dataset: Dataset
    collate: Any
    figures: Mapping[str, object]
    added: int = 0


def make_rows(
    documents: Dataset, config: Config, *, packed: bool, context: RunContext, pad_token_id: int
) -> Rows:
    """Pack the documents, or make each document a row.

    Args:
        documents: columns input_ids and labels, 1 to sequence_len tokens each.
        config: sequence_len, seed, pad_to_sequence_len and batch_flattening are read.
        packed: whether documents share rows.
        context: how the run calls its model; decides the layout of packed rows.
        pad_token_id: the token that fills the rest of a row.
    """
    fixed = config.sequence_len if config.pad_to_sequence_len else None
    flat = context.padding_free and bool(config.batch_flattening)
    rows = pack_documents(documents, config) if packed else None
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
        dataset=pack_dataset(documents, rows) if rows else documents,
        collate=CountingCollator(collate, capacity=config.sequence_len if packed else None),
        figures=row_figures(documents, rows, config),
    )


def is_packed(config: Config, *, evaluation: bool) -> bool:
    """Return whether a split is packed: evaluation as training, unless the config says otherwise.

    Without sample_packing nothing is packed: no proof shows that the model isolates documents.
    """
    return bool(config.sample_packing) and not (evaluation and config.eval_sample_packing is False)


def row_figures(documents: Dataset, rows: PackedRows | None, config: Config) -> dict[str, Any]:
    """Return the statistics of a split's rows; without packing, each document is a row."""
    tokens = int(row_lengths(documents).sum())
    count = rows.count if rows else len(documents)
    return {
        "packed": rows is not None,
        "documents": len(documents),
        "rows": count,
        "tokens": tokens,
        "row_capacity": config.sequence_len,
        "filled_share": rows.filled_share if rows else tokens / (count * config.sequence_len),
    }


def pack_documents(documents: Dataset, config: Config) -> PackedRows:
    """Return which documents share which row."""
    return pack(row_lengths(documents), capacity=config.sequence_len, seed=config.seed)


def row_lengths(documents: Dataset) -> Any:
    """Count the tokens of each document, int64 (documents,), without making Python lists."""
    column = documents.with_format("arrow")["input_ids"]
    chunks = column if hasattr(column, "combine_chunks") else column[:]
    return np.asarray(chunks.combine_chunks().value_lengths(), dtype=np.int64)


def pad_rows_to_multiple(rows: Rows, *, multiple: int, pad_token_id: int) -> Rows:
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
        drops_added: whether rows that `pad_rows_to_multiple` added are dropped from a batch that
            has other rows.
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
        positions = batch["input_ids"].numel() if counted else 0
        if self.capacity:
            positions = self.capacity * len(counted)
        batch[COUNTS] = torch.tensor([tokens, positions])
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
        input_ids = _place_on_tokens(examples, "input_ids", layout.is_token, fill=self.pad_token_id)
        labels = _place_on_tokens(examples, "labels", layout.is_token, fill=NO_LOSS)
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
    """Collate documents, one per row, padded on the right.

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
            "input_ids": _place_on_tokens(examples, "input_ids", is_token, fill=self.pad_token_id),
            "labels": _place_on_tokens(examples, "labels", is_token, fill=NO_LOSS),
            "attention_mask": is_token.astype(np.int64),
        }
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _place_on_tokens(
    examples: Sequence[Mapping[str, Any]], column: str, is_token: NDArray[np.bool_], *, fill: int
) -> NDArray[np.int64]:
    """Place one column's values on the tokens, row after row, and `fill` on the padding."""
    placed = np.full(is_token.shape, fill, dtype=np.int64)
    placed[is_token] = np.concatenate([np.asarray(example[column]) for example in examples])
    return placed


class LengthGroupedOrder:
    """Order the rows of an epoch at random, with rows of similar lengths beside each other.

    The order depends on seed and epoch alone, so that a resumed run continues it; transformers' own
    sampler draws it from torch's global generator.

    Args:
        lengths: tokens of each row.
        together: number of rows that get similar lengths: those of an optimizer step.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], *, together: int, seed: int) -> None:
        self.lengths, self.together, self.seed, self.epoch = lengths, together, seed, 0

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch; the next epoch has another order."""
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from get_length_grouped_indices(self.lengths, self.together, generator=generator)
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the next order."""
        self.epoch = epoch


class EpochSampler(Sampler[int]):  # type: ignore[misc]  # torch's types are not followed
    """Sample the rows in a given order, with the added rows at the end of an epoch.

    accelerate would fill up the last batches with rows from the start of the epoch, which would be
    trained twice.

    Args:
        order: yields the rows to train on.
        rows: number of them.
        added: number of rows without loss after them, from `pad_rows_to_multiple`.
    """

    def __init__(
        self, order: SeedableRandomSampler | LengthGroupedOrder, *, rows: int, added: int
    ) -> None:
        self.order, self.rows, self.added = order, rows, added

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch; the next epoch has another order."""
        yield from self.order
        yield from range(self.rows, self.rows + self.added)

    def __len__(self) -> int:
        """Return the number of rows, the added ones included."""
        return self.rows + self.added

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the next order."""
        self.order.set_epoch(epoch)


Integers = NDArray[np.int64]

# Rows that pack_dataset copies at once: about 16 MB at 2048 tokens, so that memory-mapped data is
# not loaded as a whole.
ROWS_PER_BATCH = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """The documents of each row, as flat arrays.

    Attributes:
        documents: indices of the documents, row after row, each exactly once; (documents,).
        offsets: row r has documents[offsets[r]:offsets[r + 1]]; (rows + 1,).
        capacity: tokens that fit in a row.
        tokens: tokens in all documents.
    """

    documents: Integers
    offsets: Integers
    capacity: int
    tokens: int

    @property
    def count(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    @property
    def filled_share(self) -> float:
        """Return tokens / (rows * capacity); 1.0 where there are no rows."""
        return self.tokens / (self.count * self.capacity) if self.count else 1.0


def pack(lengths: ArrayLike, *, capacity: int, seed: int) -> PackedRows:
    """Pack documents into rows.

    The seed shuffles the rows, the documents inside a row, and documents of equal length:
    consecutive rows of the search have equal lengths, and would otherwise be trained on together.

    Args:
        lengths: tokens in each document, 1 to `capacity`; (documents,).
        capacity: tokens that fit in a row, at least 1.
        seed: of the shuffle; the same lengths, capacity and seed give the same rows.

    Raises:
        AttnimgError: a document is empty or longer than a row (`bad-data`).
    """
    assert capacity >= 1, f"capacity {capacity}"
    lengths_N = np.asarray(lengths, dtype=np.int64).reshape(-1)
    _refuse_unpackable(lengths_N, capacity=capacity)
    patterns = find_rows(np.bincount(lengths_N, minlength=capacity + 1))
    row_sizes, slot_lengths_N = _expand(patterns)
    rng = np.random.default_rng(seed)
    # Sorted by length, the k-th slot fits the k-th document, whatever row the slot is in.
    shuffled_N = rng.permutation(len(lengths_N))
    by_length_N = shuffled_N[np.argsort(lengths_N[shuffled_N], kind="stable")]
    documents_N = np.empty_like(by_length_N)
    documents_N[np.argsort(slot_lengths_N, kind="stable")] = by_length_N
    place = rng.permutation(len(row_sizes))
    place_N = np.repeat(place, row_sizes)
    order_N = np.lexsort((rng.random(len(documents_N)), place_N))
    sizes_shuffled = np.empty_like(row_sizes)
    sizes_shuffled[place] = row_sizes
    return PackedRows(
        documents=documents_N[order_N],
        offsets=np.concatenate(([0], np.cumsum(sizes_shuffled))),
        capacity=capacity,
        tokens=int(lengths_N.sum()),
    )


def pack_dataset(documents: Dataset, rows: PackedRows) -> Dataset:
    """Copy the documents' tokens into rows.

    Args:
        documents: columns input_ids and labels, lists of integers of equal length; others are
            left out.
        rows: as `pack` returns it for the lengths of these documents.

    Returns:
        A dataset of `rows.count` rows, in memory, with columns input_ids and labels (documents one
        after the other, int32) and document_lengths (tokens of each, in the same order).
    """
    import pyarrow as pa
    from datasets import Dataset, Features, List, Value

    assert len(documents) == len(rows.documents), "rows were packed for other documents"
    columns = ("input_ids", "labels", "document_lengths")
    schema = pa.schema([(name, pa.list_(pa.int32())) for name in columns])
    source = documents.select_columns(["input_ids", "labels"]).with_format("arrow")
    batches = [
        _gather_rows(source, rows, first=first).cast(schema)
        for first in range(0, rows.count, ROWS_PER_BATCH)
    ]
    table = pa.concat_tables(batches) if batches else schema.empty_table()
    # A Dataset made of a table without Features would guess them from the first rows.
    features = Features({name: List(Value("int32")) for name in columns})
    return Dataset(table.cast(features.arrow_schema))


def find_rows(counts: NDArray[np.int64]) -> dict[tuple[int, ...], int]:
    """Return rows for all documents.

    First-fit-decreasing is tried as well: where most lengths exceed half a row it is sometimes the
    better one (log-normal with sigma 0.2 around 1000 of 2048 tokens, by 0.03 %).

    Args:
        counts: documents of each length; (capacity + 1,), counts[0] is 0.

    Returns:
        Lengths of a row -> how many rows are made of them.
    """
    candidates = (fill_rows(counts, exact_pairs=exact) for exact in (True, False))
    return min(candidates, key=lambda rows: sum(rows.values()))


def fill_rows(counts: NDArray[np.int64], *, exact_pairs: bool) -> dict[tuple[int, ...], int]:
    """Return rows that use up all lengths.

    Args:
        counts: documents of each length; (capacity + 1,).
        exact_pairs: look for two lengths that fill a row to its end before taking the longest one
            that fits; first-fit-decreasing when False.

    Returns:
        Lengths of a row -> how many rows are made of them.
    """
    lengths = _Lengths(counts)
    rows: dict[tuple[int, ...], int] = {}
    while lengths.present:
        pattern: list[int] = []
        space = lengths.capacity
        while longest := lengths.longest(space):
            # A single length that fits exactly is better than a pair; a pair fills at most twice
            # the longest.
            search = exact_pairs and pattern and longest < space <= 2 * longest
            # Equal short documents are taken at once, until a pair may fill the rest of the row.
            copies = max(1, min(lengths.left[longest], space // longest - 2))
            pair = lengths.exact_pair(space) if search else None
            for length, count in ((pair[0], 1), (pair[1], 1)) if pair else ((longest, copies),):
                pattern += [length] * count
                space -= length * count
                lengths.take(length, count)
        uses = Counter(pattern)
        repeats = min(lengths.left[length] // used for length, used in uses.items())
        if repeats:
            for length, used in uses.items():
                lengths.take(length, repeats * used)
        key = tuple(pattern)
        rows[key] = rows.get(key, 0) + 1 + repeats
    return rows


class _Lengths:
    """How many documents of each length are left, and which lengths those are, as bits.

    Python's integers search 2048 lengths in under a microsecond; NumPy needs several.

    Attributes:
        left: documents of each length.
        present: bit l is set where documents of length l are left.
        mirrored: bit capacity - l is set where documents of length l are left.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self.left = counts.tolist()
        self.capacity = len(counts) - 1
        self.present, self.mirrored = (
            int.from_bytes(np.packbits(is_present, bitorder="little").tobytes(), "little")
            for is_present in (counts > 0, counts[::-1] > 0)
        )

    def take(self, length: int, count: int) -> None:
        """Remove `count` documents of one length."""
        self.left[length] -= count
        if not self.left[length]:
            self.present ^= 1 << length
            self.mirrored ^= 1 << (self.capacity - length)

    def longest(self, space: int) -> int:
        """Return the longest length that fits into `space`, 0 for none."""
        return max(0, (self.present & ((2 << space) - 1)).bit_length() - 1)

    def exact_pair(self, space: int) -> tuple[int, int] | None:
        """Return the most equal pair of lengths that sums to `space`.

        Medium lengths are the hardest to place later, while short ones fit anywhere. Taking the
        most unequal pairs first filled rows of log-normal lengths up to 0.1 % less.
        """
        half = (space + 1) // 2
        upper = (self.present & (self.mirrored >> (self.capacity - space))) >> half
        if 2 * half == space and self.left[half] < 2:
            upper &= ~1
        if not upper:
            return None
        longer = half + (upper & -upper).bit_length() - 1
        return longer, space - longer


def _expand(patterns: dict[tuple[int, ...], int]) -> tuple[Integers, Integers]:
    """Return documents per row (rows,), and the length of every slot (documents,)."""
    repeats = np.fromiter(patterns.values(), dtype=np.int64, count=len(patterns))
    sizes = np.fromiter(map(len, patterns), dtype=np.int64, count=len(patterns))
    slots = [np.tile(np.array(pattern, dtype=np.int64), n) for pattern, n in patterns.items()]
    return np.repeat(sizes, repeats), np.concatenate(slots) if slots else np.empty(0, np.int64)


def _refuse_unpackable(lengths_N: Integers, *, capacity: int) -> None:
    """Raise if documents are empty or longer than a row."""
    wrong = np.flatnonzero((lengths_N < 1) | (lengths_N > capacity))
    if len(wrong):
        raise AttnimgError(
            f"{len(wrong):,} of {len(lengths_N):,} documents can't be packed",
            why=f"document {wrong[0]} has {lengths_N[wrong[0]]:,} tokens; needed 1 to {capacity:,}",
            do="raise sequence_len, or set excess_length_strategy: split",
            code="bad-data",
            key="sequence_len",
        )


def _gather_rows(source: Dataset, rows: PackedRows, *, first: int) -> pyarrow.Table:
    """Return up to ROWS_PER_BATCH rows from `first` on, from a dataset in arrow format."""
    import pyarrow as pa

    row_bounds = rows.offsets[first : first + ROWS_PER_BATCH + 1]
    found = source[rows.documents[row_bounds[0] : row_bounds[-1]]].combine_chunks()
    in_batch = row_bounds - row_bounds[0]
    columns = {name: found[name].combine_chunks() for name in ("input_ids", "labels")}
    lengths_N = columns["input_ids"].value_lengths().to_numpy().astype(np.int32)
    if not np.array_equal(lengths_N, columns["labels"].value_lengths().to_numpy()):
        raise AttnimgError(
            "a document has different numbers of labels and tokens",
            why="input_ids and labels differ in length; each token needs one label (-100: no loss)",
            do="remove the folder that dataset_prepared_path names, and run again",
            code="bad-data",
        )
    token_bounds = np.concatenate(([0], np.cumsum(lengths_N)))[in_batch].astype(np.int32)
    row_columns = {
        name: pa.ListArray.from_arrays(token_bounds, c.flatten()) for name, c in columns.items()
    }
    row_columns["document_lengths"] = pa.ListArray.from_arrays(in_batch.astype(np.int32), lengths_N)
    return pa.table(row_columns)

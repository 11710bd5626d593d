"""List the probes of a proof: the attention calls that are made to find errors of a backend.

They use the run's own geometry. Lengths are odd, up to sequence_len; tensors have the memory
layouts that models produce; every length from 1 to 72 occurs, since a kernel may fail at a single
one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from attnimg.facts import Backend, Geometry

Layout = Literal["fused", "heads-first", "tokens-first", "mixed"]

# The distribution of the scores, in the order of the names below:
# spread: around 0.
# negative: all about -110, where exp() in float32 underflows (pytorch#196678: NaN in dq).
# large: all about +190, where exp() overflows unless the maximum is subtracted; v has outliers.
# near-cap: about as large as the soft cap.
# flat: nearly equal, so that many small terms are added up.
# zero-tokens: spread, but q, k or v is 0 for some tokens, as on padding or after a zero init.
# large-v: spread, with values of v in the hundreds.
# hundreds: in steps from 60 to 480, so that clamping the scores makes different ones equal.
# below-hundreds: the same steps, with all scores below -200.
# neighbours: spread, with each query's weight on itself and the two keys just before it, across the
# borders of tiles.
Scores = Literal[
    "spread",
    "negative",
    "large",
    "near-cap",
    "flat",
    "zero-tokens",
    "large-v",
    "hundreds",
    "below-hundreds",
    "neighbours",
]

# Kernels whose source we have not reviewed are probed at every length up to this one, and at the
# lengths in _BEYOND.
EVERY_LENGTH = 512

_BEYOND = (600, 767, 768, 1000, 1023, 1024, 1025, 1536, 2047, 2048, 2049, 3001, 4095, 4096)

# Up to this many tokens, all query rows of a probe are compared; see calls.py.
_WHOLE_ROW = 384

# Sizes of the output's gradient: with a loss that is a mean over a row's tokens, and with a scaled
# loss. float16 numbers are 2e-5 apart at the smaller size, which is why its losses are scaled.
_GRADIENTS = {
    "float32": (2.0**-26, 2.0**10),
    "bfloat16": (2.0**-26, 2.0**10),
    "float16": (2.0**-4, 2.0**4),
}

# A scale above 1, which a kernel may reject as an error; models that normalize q and k use one.
_ABOVE_1 = 3.0

# 7 * 256 + 1 tokens in all.
_LADDER = (95, 96, 127, 128, 129, 160, 192, 255, 257, 354)

# Lengths for which kernels have special code, each one at each of the four positions in a row. The
# rows have 257, 256 and 511 tokens, so that they too end close to the end of a tile.
_IN_PLACES = ((64, 33, 128, 32), (17, 129, 2, 108), (65, 127, 256, 63))

# Lengths of the documents beside the longest one of a whole row, repeated in this order.
_MANY = (1, 17, 3, 64, 2, 33, 1, 5, 129, 9)

# Lengths of the documents in a short row with all heads: more than 8 documents.
_THIRTEEN = (19, 1, 46, 1, 2, 129, 5, 1, 31, 3, 7, 1, 17)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One attention call of a proof.

    Attributes:
        name: its description in messages.
        geometry: the heads and the window of this call; the rest is the run's.
        lengths: tokens of each document of the row when packed, else of each row of the batch.
        packed: whether the documents share one row.
        queries: number of query tokens where it is smaller than that of keys; None if equal.
        layout: memory layout of q, k and v: views of one tensor as after a fused projection, as
            after rotary embeddings, contiguous as kernels take them, or a different one for each.
        scores: see Scores.
        scale_factor: the scale of the call is this times D ** -0.5.
        longest_slack: by how much max_length exceeds the longest document.
        gradient_scale: approximate size of the output's gradient.
        repeated: whether the call is made twice and its documents are perturbed.
        also_learning: which of "dk" and "dv" are requested in a second call, whose output has a
            gradient at every row; empty for no such call. See check_whole_row.
    """

    name: str
    geometry: Geometry
    lengths: tuple[int, ...]
    packed: bool = False
    queries: int | None = None
    layout: Layout = "fused"
    scores: Scores = "spread"
    scale_factor: float = 1.0
    longest_slack: int = 0
    gradient_scale: float = 1.0
    repeated: bool = False
    also_learning: tuple[str, ...] = ()

    @property
    def in_training(self) -> bool:
        """Return whether training makes such calls: none has a cache or an empty document."""
        return self.queries is None and all(self.lengths)


def cases_of(geometry: Geometry, *, budget: Budget) -> list[Case]:
    """List the probes of one geometry, the quickest to fail first."""
    longest = longest_of(geometry, budget)
    cases = _packed(geometry, longest, budget=budget) if geometry.packing else []
    if geometry.dense:
        cases += _dense(geometry, longest, budget=budget)
    if geometry.every_length:
        cases += _every_length(geometry, longest)
    return cases


def _every_length(geometry: Geometry, longest: int) -> list[Case]:
    """Return probes of each length that no other probe has, in rows of one or more documents."""
    few = short_window(few_heads(geometry))
    last = min(max(longest, EVERY_LENGTH // 2), EVERY_LENGTH)
    lengths = [*range(73, last + 1), *_beyond(longest)]
    if not geometry.packing:
        return [_plain_case(few, n) for n in lengths]
    rows: list[list[int]] = [[]]
    for length in lengths:
        if sum(rows[-1]) + length > _WHOLE_ROW:
            rows.append([])
        rows[-1].append(length)
    # Also each number of documents per row up to 32, with unequal lengths.
    counts = [
        Case(
            name=f"{n} documents",
            geometry=few,
            lengths=tuple(2 + place % 5 for place in range(n)),
            packed=True,
        )
        for n in range(2, 33)
    ]
    return counts + [
        Case(
            name=f"documents of {' and '.join(map(str, row))}",
            geometry=few,
            lengths=tuple(row),
            packed=True,
        )
        for row in rows
        if row
    ]


def _beyond(longest: int) -> list[int]:
    """Return lengths above EVERY_LENGTH: common ones, and those around each eighth of the row."""
    spread = {n for eighth in range(1, 8) for n in _around(longest * eighth // 8)}
    return sorted(n for n in spread | set(_BEYOND) if EVERY_LENGTH < n < longest)


def _around(length: int) -> tuple[int, int]:
    below = length // 96 * 96
    return below, below + 37


def _packed(geometry: Geometry, longest: int, *, budget: Budget) -> list[Case]:
    """Return probes of packed rows: equal, unequal and single documents, and all small lengths."""
    short = short_window(two_groups(geometry))
    few = short_window(few_heads(geometry))
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    cases = [
        Case(
            name="documents of 13, 1, 64, 192, 5, 67 and 1",
            geometry=short,
            lengths=(13, 1, 64, 192, 5, 67, 1),
            repeated=True,
        ),
        # The same number of tokens and documents and the same longest one as above: a kernel that
        # caches something under these numbers gets this row wrong.
        Case(
            name="documents of 1, 67, 5, 192, 64, 1 and 13",
            geometry=short,
            lengths=(1, 67, 5, 192, 64, 1, 13),
        ),
        Case(
            name="strongly negative scores",
            geometry=short,
            lengths=(192, 64, 33),
            scores="negative",
        ),
        Case(
            name="large scores",
            geometry=short,
            lengths=(64, 97, 130),
            layout="mixed",
            scores="large",
        ),
        Case(
            name="max_length larger than needed",
            geometry=short,
            lengths=(31, 97, 2),
            layout="heads-first",
            longest_slack=70,
        ),
        Case(name="another scale", geometry=short, lengths=(46, 83), scale_factor=0.6),
        Case(name="a scale above 1", geometry=short, lengths=(44, 83), scale_factor=above),
        Case(name="tokens of zeros", geometry=short, lengths=(45, 83), scores="zero-tokens"),
        Case(name="the keys just before", geometry=few, lengths=(288, 95), scores="neighbours"),
        Case(name="large values", geometry=short, lengths=(45, 83), scores="large-v"),
        Case(name="equal documents", geometry=short, lengths=(48,) * 4, layout="tokens-first"),
        Case(name="one document", geometry=short, lengths=(127,), layout="tokens-first"),
        Case(name="every length from 1 to 40", geometry=few, lengths=tuple(range(1, 41))),
        Case(name="every length from 72 to 41", geometry=few, lengths=tuple(range(72, 40, -1))),
        Case(name="lengths around tiles", geometry=few, lengths=_LADDER, layout="heads-first"),
        *(
            Case(
                name=f"documents of {', '.join(map(str, lengths))}",
                geometry=few,
                lengths=lengths,
            )
            for row in _IN_PLACES
            for lengths in (row[place:] + row[:place] for place in range(len(row)))
        ),
        Case(name="300 documents", geometry=few, lengths=(1, 2, 3) * 100),
        Case(name="empty documents", geometry=few, lengths=(0, 33, 1, 0, 0, 64, 2, 0, 1)),
        Case(name="all heads", geometry=geometry, lengths=_THIRTEEN, layout="mixed"),
        *(
            Case(name=f"gradients of {g:.0e}", geometry=short, lengths=(45, 83), gradient_scale=g)
            for g in _GRADIENTS[geometry.dtype]
        ),
        Case(name="flat scores", geometry=few_heads(geometry), lengths=(longest,), scores="flat"),
        *_whole_rows(geometry, budget),
    ]
    if whole_row(geometry, budget) < longest:
        half, third = longest // 2, longest // 3
        rows = rows_of(geometry, longest, budget)
        lengths = (half, third, longest - half - third) * rows
        name = f"{rows} full rows in one" if rows > 1 else "a full row"
        group = one_group(geometry)
        n = min(longest, int((budget.held / group.heads) ** 0.5))
        cases += [
            Case(name=name, geometry=few_heads(geometry), lengths=lengths),
            Case(
                name=f"a document of {n}, one group of heads",
                geometry=group,
                lengths=(n,),
                layout="heads-first",
            ),
        ]
    if geometry.softcap:
        cases.append(
            Case(name="scores near the cap", geometry=short, lengths=(64, 97), scores="near-cap")
        )
    else:
        cases += [
            Case(name="scores of hundreds", geometry=short, lengths=(83, 45), scores="hundreds"),
            Case(
                name="scores below -200",
                geometry=short,
                lengths=(45, 83),
                scores="below-hundreds",
            ),
        ]
    return [replace(case, packed=True) for case in cases]


def _whole_rows(geometry: Geometry, budget: Budget) -> list[Case]:
    """Return probes of a full row of the run with all heads: with one document, and with many."""
    row = whole_row(geometry, budget)
    # Kernels that take cu_seqlens get all rows of a batch concatenated in one call.
    total = geometry.rows * geometry.sequence_len
    if row < geometry.sequence_len or geometry.heads * total**2 > budget.whole:
        total = row
    long = min(total // 2, geometry.sequence_len)
    factor = max(1, geometry.sequence_len // 2048)
    lengths: list[int] = []
    while (left := total - long - sum(lengths)) > 0:
        length = _MANY[len(lengths) % len(_MANY)]
        lengths.append(min(left, length if length < len(_MANY) else length * factor))
    lengths.insert(len(lengths) // 2, long)
    return [
        Case(
            name=f"a whole row of {total} tokens in {len(lengths)} documents, all heads",
            geometry=geometry,
            lengths=tuple(lengths),
            also_learning=("dv",),
        ),
        Case(
            name=f"a whole row of {row} tokens in one document, all heads",
            geometry=geometry,
            lengths=(row,),
            layout="heads-first",
            also_learning=("dk", "dv"),
        ),
    ]


def _dense(geometry: Geometry, longest: int, *, budget: Budget) -> list[Case]:
    """Return probes of rows with one document each, alone or padded to a common length."""
    short = short_window(two_groups(geometry))
    few = short_window(few_heads(geometry))
    run = few_heads(geometry)
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    steps = range(96, min(longest, 512), 32)
    middle = sorted({n for n in (*_LADDER, *steps, longest // 2 + 1) if n > 72})
    cases = [
        Case(name="192 tokens", geometry=short, lengths=(192, 192), repeated=True),
        Case(name="1 token", geometry=short, lengths=(1, 1, 1)),
        Case(
            name="192 tokens, strongly negative scores",
            geometry=short,
            lengths=(192,),
            scores="negative",
        ),
        Case(
            name="97 tokens, large scores",
            geometry=short,
            lengths=(97,),
            layout="mixed",
            scores="large",
        ),
        Case(name="83 tokens, another scale", geometry=short, lengths=(83,), scale_factor=0.6),
        Case(name="83 tokens, scale above 1", geometry=short, lengths=(83,), scale_factor=above),
        Case(name="83 tokens, some zeros", geometry=short, lengths=(83,), scores="zero-tokens"),
        Case(name="the keys just before", geometry=few, lengths=(288,), scores="neighbours"),
        Case(name="83 tokens, large values", geometry=short, lengths=(83,), scores="large-v"),
        Case(name="13 queries, 77 keys", geometry=short, lengths=(77,), queries=13),
        Case(name="46 tokens, all heads", geometry=geometry, lengths=(46,), layout="heads-first"),
        Case(name="161 tokens, all heads", geometry=geometry, lengths=(161,), layout="mixed"),
        *(
            Case(
                name=f"83 tokens, gradients of {g:.0e}",
                geometry=short,
                lengths=(83,),
                gradient_scale=g,
            )
            for g in _GRADIENTS[geometry.dtype]
        ),
        Case(name="2 rows of 257", geometry=short, lengths=(257, 257)),
        *(_plain_case(short, n) for n in (2, 17, 31, 64, 65, 127, 128, 129, 257)),
        *(_plain_case(few, n) for n in (*range(3, 73), *middle)),
        Case(name="flat scores", geometry=run, lengths=(longest,), scores="flat"),
    ]
    if geometry.packing:
        # Calls of a packed run have document boundaries. This one has none, and so takes another
        # path to the kernel.
        cases.append(Case(name=f"{longest} tokens", geometry=run, lengths=(longest,)))
    else:
        cases += [
            Case(name="padded rows", geometry=short, lengths=(61, 48, 1)),
            *_whole_batch(geometry, longest, budget),
        ]
    if geometry.softcap:
        cases.append(
            Case(name="scores near the cap", geometry=short, lengths=(97,), scores="near-cap")
        )
    else:
        cases += [
            Case(
                name="97 tokens, scores of hundreds",
                geometry=short,
                lengths=(97,),
                scores="hundreds",
            ),
            Case(
                name="97 tokens, scores below -200",
                geometry=short,
                lengths=(97,),
                scores="below-hundreds",
            ),
        ]
    return cases


def _whole_batch(geometry: Geometry, longest: int, budget: Budget) -> list[Case]:
    """Return probes of a batch with all heads, as large as the run's or as the budget allows."""
    whole = whole_row(geometry, budget)
    rows = geometry.rows if geometry.heads * geometry.rows * whole**2 <= budget.whole else 1
    cases = [
        Case(
            name=f"{rows} x {whole} tokens, all heads",
            geometry=geometry,
            lengths=(whole,) * rows,
            layout="heads-first",
            also_learning=("dk", "dv"),
        )
    ]
    if whole < longest:
        group = one_group(geometry)
        n = min(longest, int((budget.held / group.heads) ** 0.5))
        cases.append(Case(name=f"{n} tokens, one group of heads", geometry=group, lengths=(n,)))
    held = rows_of(geometry, longest, budget)
    if rows < geometry.rows and held > 1:
        few = few_heads(geometry)
        cases.append(
            Case(name=f"{held} rows of {longest}", geometry=few, lengths=(longest,) * held)
        )
    return cases


def _plain_case(geometry: Geometry, length: int) -> Case:
    layouts: tuple[Layout, ...] = ("fused", "heads-first", "tokens-first", "mixed")
    return Case(
        name=f"{length} tokens", geometry=geometry, lengths=(length,), layout=layouts[length % 4]
    )


# Most scores of a call with all heads on a GPU, for kernels that do not store them: 32 heads of
# 32768 tokens.
_COMPUTED = 1 << 35

# Bytes of a GPU's memory for each score of plain attention: scores, softmax and weights and the
# gradients of all three, with up to 4 bytes each, take 24.
_BYTES_A_SCORE = 40

# Bytes for each number in a whole row's q and v: drawing them takes 4 arrays in float64.
_DRAWN = 4 * 8

# Kernels that store all scores, besides those that get a mask of all pairs of tokens.
_HOLDING = frozenset({"sdpa_math", "s2"})

# A sliding window longer than the short probes would have no effect in them.
_SHORT_WINDOW = 37


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The limits of the longest probes.

    Attributes:
        held: scores that plain attention stores at once, in a probe with few heads.
        whole: scores of a call with all heads of the run.
        drawn: bytes of the inputs that are drawn for such a call.
    """

    held: int
    whole: int
    drawn: int


# 134 MB in float32. The call with all heads is limited by its time: 32 heads of 829 tokens.
CPU = Budget(held=1 << 25, whole=21 << 20, drawn=1 << 30)


def budget_of(backend: Backend, *, memory_bytes: int | None) -> Budget:
    """Return the budget of a backend's probes.

    Args:
        backend: some backends store all scores.
        memory_bytes: of the GPU; None for a CPU.
    """
    if memory_bytes is None:
        return CPU
    held = memory_bytes // _BYTES_A_SCORE
    holding = backend.mask in ("sdpa", "eager") or backend.name in _HOLDING
    return Budget(held=held, whole=held if holding else _COMPUTED, drawn=memory_bytes // 4)


def longest_of(geometry: Geometry, budget: Budget) -> int:
    """Return the longest document that is probed: sequence_len, or what the budget allows."""
    few = int((budget.held / few_heads(geometry).heads) ** 0.5)
    return min(geometry.sequence_len, max(few, whole_row(geometry, budget)))


def rows_of(geometry: Geometry, longest: int, budget: Budget) -> int:
    """Return how many rows of that length are probed: the run's, or what the budget allows."""
    held = int((budget.held / few_heads(geometry).heads) ** 0.5) // longest
    return min(geometry.rows, held)


def whole_row(geometry: Geometry, budget: Budget) -> int:
    """Return the tokens of a probe with all heads: sequence_len, or what the budget allows."""
    size = geometry.heads * (geometry.head_dim_qk + geometry.head_dim_v) * _DRAWN
    tokens = min(int((budget.whole / geometry.heads) ** 0.5), budget.drawn // size)
    return min(geometry.sequence_len, max(129, tokens))


def two_groups(geometry: Geometry) -> Geometry:
    """Return a geometry with two key heads and their query heads."""
    kv_heads = min(geometry.kv_heads, 2)
    heads = geometry.heads // geometry.kv_heads * kv_heads
    return replace(geometry, heads=heads, kv_heads=kv_heads)


def one_group(geometry: Geometry) -> Geometry:
    """Return a geometry with one key head and its query heads."""
    return replace(geometry, heads=geometry.heads // geometry.kv_heads, kv_heads=1)


def few_heads(geometry: Geometry) -> Geometry:
    """Return a geometry with one key head and at most two of its query heads."""
    heads = min(geometry.heads // geometry.kv_heads, 2)
    return replace(geometry, heads=heads, kv_heads=1)


def short_window(geometry: Geometry) -> Geometry:
    """Return a geometry with a window that is shorter than the documents of the short probes."""
    if geometry.window is None or geometry.window <= _SHORT_WINDOW:
        return geometry
    return replace(geometry, window=_SHORT_WINDOW)

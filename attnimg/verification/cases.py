"""List the probes of a proof: the attention calls that are made to find errors of a backend.

They use the run's own heads and head sizes. Lengths are odd, up to sequence_len; tensors have the
memory layouts that models produce; every length from 1 to 72 occurs, since a kernel may fail at a
single one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

from attnimg.facts import Backend
from attnimg.run_facts import Geometry

# Three letters are the layouts of q, k and v: by heads, by tokens, part of a tensor of more heads.
Layout = Literal[
    "fused", "heads-first", "tokens-first", "htp", "hpt", "thp", "tph", "pht", "pth"
]  # fmt: skip
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

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

# Lengths of the documents in a short row with all heads: more than 32 documents, with neighbours of
# equal length.
_SHORT_DOCUMENTS = (
    19, 1, 20, 1, 1, 33, 5, 2, 31, 31, 7, 1, 17, 3, 3, 4, 1, 2, 2, 1, 1, 5, 5, 2, 1, 3, 1, 1, 1, 6,
    2, 4, 4, 1, 2,
)  # fmt: skip


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
            after rotary embeddings, contiguous as kernels take them, or a different one for each,
            since a kernel may take the strides of one for those of another.
        scores: see Scores.
        scale_factor: the scale of the call is this times D ** -0.5.
        max_length_slack: by how much max_length exceeds the longest document.
        gradient_scale: approximate size of the output's gradient.
        repeated: whether the call is repeated and its documents are perturbed.
        extra_gradients: which of "dk" and "dv" are requested in a second call, whose output has a
            gradient at every row; empty for no such call. See check_full_row.
    """

    name: str
    geometry: Geometry
    lengths: tuple[int, ...]
    packed: bool = False
    queries: int | None = None
    layout: Layout = "fused"
    scores: Scores = "spread"
    scale_factor: float = 1.0
    max_length_slack: int = 0
    gradient_scale: float = 1.0
    repeated: bool = False
    extra_gradients: tuple[str, ...] = ()

    @property
    def in_training(self) -> bool:
        """Return whether training makes such calls: it uses no KV cache and no empty documents."""
        return self.queries is None and all(self.lengths)


def list_cases(geometry: Geometry, *, budget: Budget) -> list[Case]:
    """List the probes of one geometry, the quickest to fail first."""
    longest = longest_document(geometry, budget)
    cases = _packed(geometry, longest, budget=budget) if geometry.packing else []
    if geometry.dense:
        cases += _dense(geometry, longest, budget=budget)
    if geometry.every_length:
        cases += _every_length(geometry, longest)
    return cases


def _every_length(geometry: Geometry, longest: int) -> list[Case]:
    """Return probes of each length that no other probe has, in rows of one or more documents."""
    few = with_short_window(with_few_heads(geometry))
    last = min(max(longest, EVERY_LENGTH // 2), EVERY_LENGTH)
    lengths = [*range(73, last + 1), *_beyond(longest)]
    if not geometry.packing:
        return [_plain_case(few, n) for n in lengths]
    rows: list[list[int]] = [[]]
    for length in lengths:
        if sum(rows[-1]) + length > _WHOLE_ROW:
            rows.append([])
        rows[-1].append(length)
    # Also each number of documents per row up to 32, with unequal lengths and all heads.
    counted = {f"{n} documents": [2 + place % 5 for place in range(n)] for n in range(2, 33)}
    probed = {f"documents of {' and '.join(map(str, row))}": row for row in rows if row}
    return [
        Case(name=name, geometry=heads, lengths=tuple(row), packed=True)
        for heads, named in ((with_short_window(geometry), counted), (few, probed))
        for name, row in named.items()
    ]


def _beyond(longest: int) -> list[int]:
    """Return lengths above EVERY_LENGTH: common ones, and those around each eighth of the row."""
    spread = {n for eighth in range(1, 8) for n in _around(longest * eighth // 8)}
    return sorted(n for n in spread | set(_BEYOND) if EVERY_LENGTH < n < longest)


def _around(length: int) -> tuple[int, int]:
    multiple = length // 96 * 96
    return multiple, multiple + 37


def _packed(geometry: Geometry, longest: int, *, budget: Budget) -> list[Case]:
    """Return probes of packed rows: equal, unequal and single documents, and all small lengths."""
    two_groups = partial(Case, packed=True, geometry=with_short_window(with_two_groups(geometry)))
    few_heads = partial(Case, packed=True, geometry=with_short_window(with_few_heads(geometry)))
    run = partial(Case, packed=True, geometry=with_few_heads(geometry))
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    reordered = [row[n:] + row[:n] for row in _IN_PLACES for n in range(len(row))]
    cases = [
        two_groups(
            name="documents of 13, 1, 64, 192, 5, 67 and 1",
            lengths=(13, 1, 64, 192, 5, 67, 1),
            repeated=True,
        ),
        # The same number of tokens and documents and the same longest one as above: a kernel that
        # caches something under these numbers gets this row wrong.
        two_groups(
            name="documents of 1, 67, 5, 192, 64, 1 and 13",
            lengths=(1, 67, 5, 192, 64, 1, 13),
        ),
        two_groups(name="strongly negative scores", lengths=(192, 64, 33), scores="negative"),
        two_groups(name="large scores", lengths=(64, 97, 130), layout="htp", scores="large"),
        two_groups(
            name="max_length larger than needed",
            lengths=(31, 97, 2),
            layout="heads-first",
            max_length_slack=70,
        ),
        two_groups(name="another scale", lengths=(46, 83), scale_factor=0.6, layout="hpt"),
        two_groups(name="a scale above 1", lengths=(44, 83), scale_factor=above, layout="thp"),
        two_groups(name="tokens of zeros", lengths=(45, 83), scores="zero-tokens", layout="tph"),
        few_heads(name="the keys just before", lengths=(288, 95), scores="neighbours"),
        two_groups(name="large values", lengths=(45, 83), scores="large-v", layout="pth"),
        two_groups(name="equal documents", lengths=(48,) * 4, layout="tokens-first"),
        two_groups(name="one document", lengths=(127,), layout="tokens-first"),
        few_heads(name="every length from 1 to 40", lengths=tuple(range(1, 41))),
        few_heads(name="every length from 72 to 41", lengths=tuple(range(72, 40, -1))),
        few_heads(name="lengths around tiles", lengths=_LADDER, layout="heads-first"),
        *(few_heads(name=f"documents of {', '.join(map(str, n))}", lengths=n) for n in reordered),
        few_heads(name="300 documents", lengths=(1, 1, 2, 2, 3, 3) * 50),
        few_heads(name="empty documents", lengths=(0, 33, 1, 0, 0, 64, 2, 0, 1)),
        run(name="all heads", geometry=geometry, lengths=_SHORT_DOCUMENTS, layout="pht"),
        *(
            two_groups(name=f"gradients of {g:.0e}", lengths=(45, 83), gradient_scale=g)
            for g in _GRADIENTS[geometry.dtype]
        ),
        run(name="flat scores", lengths=(longest,), scores="flat"),
        *_full_rows(geometry, budget),
    ]
    if full_row_length(geometry, budget) < longest:
        half, third = longest // 2, longest // 3
        rows = rows_within_budget(geometry, longest, budget)
        lengths = (half, third, longest - half - third) * rows
        name = f"{rows} full rows in one" if rows > 1 else "a full row"
        group, n = with_one_group(geometry), _longest_with_one_group(geometry, longest, budget)
        name_of_group = f"a document of {n}, one group of heads"
        cases += [
            run(name=name, lengths=lengths),
            run(name=name_of_group, geometry=group, lengths=(n,), layout="heads-first"),
        ]
    if geometry.softcap:
        cases.append(two_groups(name="scores near the cap", lengths=(64, 97), scores="near-cap"))
    else:
        cases += [
            two_groups(name="scores of hundreds", lengths=(83, 45), scores="hundreds"),
            two_groups(name="scores below -200", lengths=(45, 83), scores="below-hundreds"),
        ]
    return cases


def _full_rows(geometry: Geometry, budget: Budget) -> list[Case]:
    """Return probes of a full row of the run with all heads: with one document, and with many."""
    row = full_row_length(geometry, budget)
    # Kernels that take cu_seqlens get all rows of a batch concatenated in one call.
    total = geometry.rows * geometry.sequence_len
    if row < geometry.sequence_len or geometry.heads * total**2 > budget.all_heads_scores:
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
            packed=True,
            extra_gradients=("dv",),
        ),
        Case(
            name=f"a whole row of {row} tokens in one document, all heads",
            geometry=geometry,
            lengths=(row,),
            packed=True,
            layout="heads-first",
            extra_gradients=("dk", "dv"),
        ),
    ]


def _dense(geometry: Geometry, longest: int, *, budget: Budget) -> list[Case]:
    """Return probes of rows with one document each, alone or padded to a common length."""
    short = with_short_window(with_two_groups(geometry))
    few = with_short_window(with_few_heads(geometry))
    two_groups, few_heads = partial(Case, geometry=short), partial(Case, geometry=few)
    run = partial(Case, geometry=with_few_heads(geometry))
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    steps = range(96, min(longest, 512), 32)
    middle = sorted({n for n in (*_LADDER, *steps, longest // 2 + 1) if n > 72})
    cases = [
        two_groups(name="192 tokens", lengths=(192, 192), repeated=True),
        two_groups(name="1 token", lengths=(1, 1, 1)),
        two_groups(name="192 tokens, strongly negative scores", lengths=(192,), scores="negative"),
        two_groups(name="97 tokens, large scores", lengths=(97,), layout="htp", scores="large"),
        two_groups(name="83 tokens, another scale", lengths=(83,), scale_factor=0.6),
        two_groups(name="83 tokens, scale above 1", lengths=(83,), scale_factor=above),
        two_groups(name="83 tokens, some zeros", lengths=(83,), scores="zero-tokens"),
        few_heads(name="the keys just before", lengths=(288,), scores="neighbours"),
        two_groups(name="83 tokens, large values", lengths=(83,), scores="large-v"),
        two_groups(name="13 queries, 77 keys", lengths=(77,), queries=13),
        run(name="46 tokens, all heads", geometry=geometry, lengths=(46,), layout="heads-first"),
        run(name="161 tokens, all heads", geometry=geometry, lengths=(161,), layout="pht"),
        *(
            two_groups(name=f"83 tokens, gradients of {g:.0e}", lengths=(83,), gradient_scale=g)
            for g in _GRADIENTS[geometry.dtype]
        ),
        two_groups(name="2 rows of 257", lengths=(257, 257)),
        *(_plain_case(short, n) for n in (2, 17, 31, 64, 65, 127, 128, 129, 257)),
        *(_plain_case(few, n) for n in (*range(3, 73), *middle)),
        run(name="flat scores", lengths=(longest,), scores="flat"),
    ]
    if geometry.packing:
        # Calls of a packed run have document boundaries. This one has none, and so takes another
        # path to the kernel.
        cases.append(run(name=f"{longest} tokens", lengths=(longest,)))
    else:
        cases.append(two_groups(name="padded rows", lengths=(61, 48, 1)))
        cases += _full_batch(geometry, longest, budget)
    if geometry.softcap:
        cases.append(two_groups(name="scores near the cap", lengths=(97,), scores="near-cap"))
    else:
        below = "97 tokens, scores below -200"
        cases += [
            two_groups(name="97 tokens, scores of hundreds", lengths=(97,), scores="hundreds"),
            two_groups(name=below, lengths=(97,), scores="below-hundreds"),
        ]
    return cases


def _full_batch(geometry: Geometry, longest: int, budget: Budget) -> list[Case]:
    """Return probes of a batch with all heads, as large as the run's or as the budget allows."""
    length = full_row_length(geometry, budget)
    fits = geometry.heads * geometry.rows * length**2 <= budget.all_heads_scores
    rows = geometry.rows if fits else 1
    cases = [
        Case(
            name=f"{rows} x {length} tokens, all heads",
            geometry=geometry,
            lengths=(length,) * rows,
            layout="heads-first",
            extra_gradients=("dk", "dv"),
        )
    ]
    if length < longest:
        group, n = with_one_group(geometry), _longest_with_one_group(geometry, longest, budget)
        cases.append(Case(name=f"{n} tokens, one group of heads", geometry=group, lengths=(n,)))
    more_rows = rows_within_budget(geometry, longest, budget)
    if rows < geometry.rows and more_rows > 1:
        few = with_few_heads(geometry)
        name = f"{more_rows} rows of {longest}"
        cases.append(Case(name=name, geometry=few, lengths=(longest,) * more_rows))
    return cases


def _longest_with_one_group(geometry: Geometry, longest: int, budget: Budget) -> int:
    """Return the tokens of a probe with one key head and its query heads."""
    heads = geometry.heads // geometry.kv_heads
    return min(longest, int((budget.stored_scores / heads) ** 0.5))


def _plain_case(geometry: Geometry, length: int) -> Case:
    layout = LAYOUTS[length % len(LAYOUTS)]
    return Case(name=f"{length} tokens", geometry=geometry, lengths=(length,), layout=layout)


# Most scores of a call with all heads on a GPU, for kernels that do not store them: 32 heads of
# 32768 tokens.
_MAX_SCORES = 1 << 35

# Bytes of a GPU's memory for each score of plain attention: scores, softmax and weights and the
# gradients of all three, with up to 4 bytes each, take 24.
_BYTES_PER_SCORE = 40

# Bytes for each number in q and v of a full row: generating them takes 4 arrays in float64.
_BYTES_PER_NUMBER = 4 * 8

# Backends that store all scores, besides those that get a mask of all pairs of tokens.
_STORE_SCORES = frozenset({"sdpa_math", "s2"})

# A sliding window longer than the short probes would have no effect in them.
_SHORT_WINDOW = 37


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """The limits of the longest probes.

    Attributes:
        stored_scores: scores that plain attention stores at once, in a probe with few heads.
        all_heads_scores: scores of a call with all heads of the run.
        input_bytes: bytes of the inputs that are generated for such a call.
    """

    stored_scores: int
    all_heads_scores: int
    input_bytes: int


# 134 MB in float32. The call with all heads is limited by its time: 32 heads of 677 tokens.
CPU = Budget(stored_scores=1 << 25, all_heads_scores=14 << 20, input_bytes=1 << 30)


def choose_budget(backend: Backend, *, memory_bytes: int | None) -> Budget:
    """Return the budget of a backend's probes.

    Args:
        backend: some backends store all scores.
        memory_bytes: of the GPU; None for a CPU.
    """
    if memory_bytes is None:
        return CPU
    scores = memory_bytes // _BYTES_PER_SCORE
    stores_scores = backend.mask in ("sdpa", "eager") or backend.name in _STORE_SCORES
    return Budget(
        stored_scores=scores,
        all_heads_scores=scores if stores_scores else _MAX_SCORES,
        input_bytes=memory_bytes // 4,
    )


def longest_document(geometry: Geometry, budget: Budget) -> int:
    """Return the longest document that is probed: sequence_len, or what the budget allows."""
    few = int((budget.stored_scores / with_few_heads(geometry).heads) ** 0.5)
    return min(geometry.sequence_len, max(few, full_row_length(geometry, budget)))


def rows_within_budget(geometry: Geometry, longest: int, budget: Budget) -> int:
    """Return how many rows of that length are probed: the run's, or what the budget allows."""
    fitting = int((budget.stored_scores / with_few_heads(geometry).heads) ** 0.5) // longest
    return min(geometry.rows, fitting)


def full_row_length(geometry: Geometry, budget: Budget) -> int:
    """Return the tokens of a row with all heads: sequence_len, or what the budget allows."""
    size = geometry.heads * (geometry.head_dim_qk + geometry.head_dim_v) * _BYTES_PER_NUMBER
    tokens = min(int((budget.all_heads_scores / geometry.heads) ** 0.5), budget.input_bytes // size)
    return min(geometry.sequence_len, max(129, tokens))


def with_two_groups(geometry: Geometry) -> Geometry:
    """Return a geometry with two key heads and their query heads."""
    kv_heads = min(geometry.kv_heads, 2)
    heads = geometry.heads // geometry.kv_heads * kv_heads
    return replace(geometry, heads=heads, kv_heads=kv_heads)


def with_one_group(geometry: Geometry) -> Geometry:
    """Return a geometry with one key head and its query heads."""
    return replace(geometry, heads=geometry.heads // geometry.kv_heads, kv_heads=1)


def with_few_heads(geometry: Geometry) -> Geometry:
    """Return a geometry with one key head and at most two of its query heads."""
    heads = min(geometry.heads // geometry.kv_heads, 2)
    return replace(geometry, heads=heads, kv_heads=1)


def with_short_window(geometry: Geometry) -> Geometry:
    """Return a geometry with a window that is shorter than the documents of the short probes."""
    if geometry.window is None or geometry.window <= _SHORT_WINDOW:
        return geometry
    return replace(geometry, window=_SHORT_WINDOW)


# Packed rows are filled up to one of these lengths: three blocks of 128, and fifteen.
FILLED = (384, 1920)

# The most informative lengths of rows with one document: around tiles of 64 and blocks of 128.
EDGES = frozenset({1, 17, 64, 65, 127, 128, 129, 192, 257})


def reduce_shapes(cases: list[Case]) -> list[Case]:
    """Return probes with few shapes: packed rows are filled up, other rows have EDGES only."""
    longest = max(max(case.lengths) for case in cases)
    kept = []
    for case in cases:
        plain = case.scores == "spread" and case.scale_factor == case.gradient_scale == 1.0
        heads, length = case.geometry.kv_heads, max(case.lengths)
        # The probes with all heads and the longest ones keep their lengths and layouts.
        special = heads > 2 or length == longest or (heads > 1 and length > max(EDGES))
        # The first probe has two groups of heads, and later ones have its lengths with one.
        fewer = case.geometry.heads < cases[0].geometry.heads
        one_length = len(set(case.lengths)) == 1 and not case.queries
        dropped = one_length and (fewer or length not in EDGES)
        if not case.packed and plain and dropped and not special:
            continue
        laid_out = case if special else replace(case, layout="fused")
        kept.append(_filled(laid_out) if case.packed else laid_out)
    return kept


def _filled(case: Case) -> Case:
    """Return a packed row filled up to the next of FILLED with one more document."""
    total = sum(case.lengths)
    length = next((length for length in FILLED if length >= total), total)
    # The probe of isolation is not filled up: its last document is one of those that change.
    if length == total or case.repeated:
        return case
    return replace(case, lengths=(*case.lengths, length - total))

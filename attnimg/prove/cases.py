"""The probes of a proof: which calls are made to see what a backend gets wrong.

They follow the run's own geometry. Lengths are odd and reach the run's own; memory is laid out as
models lay it out; every length from 1 to 72 occurs, since a kernel may fail at a single one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from attnimg.facts import Geometry
from attnimg.prove.shown import (
    few_heads,
    longest_of,
    longest_of_all_heads,
    rows_of,
    short_window,
    two_groups,
)

Layout = Literal["fused", "heads-first", "tokens-first", "mixed"]
# What the scores look like: spread around 0; all about -110, where exp() in float32 underflows
# (pytorch#196678: NaN in dq); all about +190, where it overflows unless the largest is subtracted,
# and some values of v too; about the size of the soft cap;
# all about the same, so that many small terms are added up; spread, with some tokens whose q, k or
# v is 0, as those of padding or of a layer that starts at 0; spread, with values of v in the
# hundreds.
Scores = Literal["spread", "negative", "large", "near-cap", "flat", "zero-tokens", "large-v"]

# Every length up to this one is shown to kernels that nobody here has read, and these beyond it.
EVERY_LENGTH = 512
_BEYOND = (600, 767, 768, 1000, 1023, 1024, 1025, 1536, 2047, 2048, 2049, 3001, 4095, 4096)
# Up to so many tokens all rows of a probe are compared; see inputs.py.
_WHOLE_ROW = 384
# What the gradient of a mean over a row's tokens comes to, and what a scaled loss may. float16 has
# 2e-5 between neighbours at the lower end, which is why its losses are scaled.
_GRADIENTS = {
    "float32": (2.0**-26, 2.0**10),
    "bfloat16": (2.0**-26, 2.0**10),
    "float16": (2.0**-4, 2.0**4),
}
# A scale that a kernel may take for a mistake: models that normalize q and k have them.
_ABOVE_1 = 3.0
_LADDER = (95, 96, 127, 128, 129, 160, 192, 255, 257, 320)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One call.

    Attributes:
        name: for people.
        geometry: the heads and the window of this call; the rest is the run's.
        lengths: tokens of each document of the row when packed, else of each row of the batch.
        packed: whether the documents share one row.
        queries: query tokens when fewer than the keys; None for as many.
        layout: how q, k and v lie in memory: views of one tensor as after a fused projection, as
            after rotary embeddings, contiguous as the kernels take them, or each in another way.
        scores: see Scores.
        scale_factor: times D ** -0.5 is the scale of the call.
        longest_slack: by how much max_length exceeds the longest document.
        gradient_scale: how large the output's gradient is, about.
        repeated: whether the call is made twice and its documents are perturbed.
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


def cases_of(geometry: Geometry, *, device: str) -> list[Case]:
    """List the probes of one geometry, the quickest to fail first."""
    longest = longest_of(geometry, device=device)
    rows = rows_of(geometry, longest, device=device)
    cases = _packed(geometry, longest, rows=rows) if geometry.packing else []
    if geometry.dense:
        cases += _dense(geometry, longest, rows=rows)
    if geometry.every_length:
        cases += _every_length(geometry, longest)
    return cases


def _every_length(geometry: Geometry, longest: int) -> list[Case]:
    """Show documents of each length that no other probe has, alone or several to a row."""
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
    # And each number of documents to a row, of unequal lengths.
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
    """Give lengths past every length: the usual ones, and an odd one and one of 96s an eighth."""
    spread = {n for eighth in range(1, 8) for n in _around(longest * eighth // 8)}
    return sorted(n for n in spread | set(_BEYOND) if EVERY_LENGTH < n < longest)


def _around(length: int) -> tuple[int, int]:
    below = length // 96 * 96
    return below, below + 37


def _packed(geometry: Geometry, longest: int, *, rows: int) -> list[Case]:
    """Rows of several documents: all unequal, all equal, one alone, of every small length."""
    short = short_window(two_groups(geometry))
    few = short_window(few_heads(geometry))
    whole = longest_of_all_heads(geometry, longest)
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    half, third = longest // 2, longest // 3
    full_row = tuple(n for n in (half, third, longest - half - third) if n)
    cases = [
        Case(
            name="documents of 13, 1, 64, 192, 5, 67 and 1",
            geometry=short,
            lengths=(13, 1, 64, 192, 5, 67, 1),
            repeated=True,
        ),
        # As many tokens and documents as before, and as long a longest one: what a kernel keeps by
        # these of another row would show.
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
        Case(name="another scale", geometry=short, lengths=(45, 83), scale_factor=0.6),
        Case(name="a scale above 1", geometry=short, lengths=(45, 83), scale_factor=above),
        Case(name="tokens of zeros", geometry=short, lengths=(45, 83), scores="zero-tokens"),
        Case(name="large values", geometry=short, lengths=(45, 83), scores="large-v"),
        Case(name="equal documents", geometry=short, lengths=(48,) * 4, layout="tokens-first"),
        Case(name="one document", geometry=short, lengths=(127,), layout="tokens-first"),
        Case(name="every length from 1 to 40", geometry=few, lengths=tuple(range(1, 41))),
        Case(name="every length from 41 to 72", geometry=few, lengths=tuple(range(41, 73))),
        Case(name="lengths around tiles", geometry=few, lengths=_LADDER, layout="heads-first"),
        Case(name="300 documents", geometry=few, lengths=(1, 2, 3) * 100),
        Case(name="all heads", geometry=geometry, lengths=(19, 46, 129), layout="mixed"),
        Case(
            name=f"a document of {whole}, all heads",
            geometry=geometry,
            lengths=(whole, 3),
            layout="heads-first",
        ),
        *(
            Case(name=f"gradients of {g:.0e}", geometry=short, lengths=(45, 83), gradient_scale=g)
            for g in _GRADIENTS[geometry.dtype]
        ),
        Case(name="a full row", geometry=few_heads(geometry), lengths=full_row),
        Case(name="flat scores", geometry=few_heads(geometry), lengths=(longest,), scores="flat"),
        Case(
            name=f"a document of {longest}",
            geometry=few_heads(geometry),
            lengths=(longest, 1, 67),
            layout="heads-first",
        ),
    ]
    if rows > 1:
        name = f"{rows} full rows in one"
        cases.append(Case(name=name, geometry=few_heads(geometry), lengths=full_row * rows))
    if geometry.softcap:
        cases.append(
            Case(name="scores near the cap", geometry=short, lengths=(64, 97), scores="near-cap")
        )
    return [replace(case, packed=True) for case in cases]


def _dense(geometry: Geometry, longest: int, *, rows: int) -> list[Case]:
    """Rows of one document each, alone or padded to a common length."""
    short = short_window(two_groups(geometry))
    few = short_window(few_heads(geometry))
    run = few_heads(geometry)
    whole = longest_of_all_heads(geometry, longest)
    above = _ABOVE_1 * geometry.head_dim_qk**0.5
    steps = range(96, min(longest, 512), 32)
    middle = sorted({n for n in (*_LADDER, *steps, longest // 2 + 1, longest - 1) if n > 72})
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
        Case(name="83 tokens, large values", geometry=short, lengths=(83,), scores="large-v"),
        Case(name="13 queries, 77 keys", geometry=short, lengths=(77,), queries=13),
        Case(name="46 tokens, all heads", geometry=geometry, lengths=(46,), layout="heads-first"),
        Case(name="161 tokens, all heads", geometry=geometry, lengths=(161,), layout="mixed"),
        Case(
            name=f"{whole} tokens, all heads",
            geometry=geometry,
            lengths=(whole,),
            layout="heads-first",
        ),
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
        Case(name=f"{longest} tokens", geometry=run, lengths=(longest,), layout="heads-first"),
        Case(name="flat scores", geometry=run, lengths=(longest,), scores="flat"),
    ]
    if rows > 1:
        name = f"{rows} rows of {longest}"
        cases.append(Case(name=name, geometry=run, lengths=(longest,) * rows))
    if not geometry.packing:
        cases.append(Case(name="padded rows", geometry=short, lengths=(61, 48, 1)))
    if geometry.softcap:
        cases.append(
            Case(name="scores near the cap", geometry=short, lengths=(97,), scores="near-cap")
        )
    return cases


def _plain_case(geometry: Geometry, length: int) -> Case:
    layouts: tuple[Layout, ...] = ("fused", "heads-first", "tokens-first", "mixed")
    return Case(
        name=f"{length} tokens", geometry=geometry, lengths=(length,), layout=layouts[length % 4]
    )

"""Wrong kernels, served as local hub kernels: each is caught, for the right reason.

One child process proves them all, as `verify` would; those that kill it cost one more each. A fault
that is listed with several geometries is proven on one of them, and on all with PROOFS=all (`make
test/proofs`).
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from run_facts import a_geometry
from served_kernels import SLY, WRONG, prove_all

from attnimg.run_facts import Geometry, Proof

PACKED = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, sequence_len=300
)
SINGLE = a_geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=300)
HALF = a_geometry(
    heads=8, kv_heads=2, head_dim_qk=32, head_dim_v=32, packing=True, dtype="bfloat16",
    sequence_len=256,
)  # fmt: skip
WINDOW = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, window=64, sequence_len=300
)
CAPPED = a_geometry(
    heads=4, kv_heads=4, head_dim_qk=16, head_dim_v=16, softcap=30.0, sequence_len=200
)
DROPOUT = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=32, head_dim_v=32, packing=True, dropout=0.1, sequence_len=64
)

# fault, geometry, the reason that must be told (and none: a right kernel must pass)
FAULTS = [
    ("none", PACKED, None),
    ("none", SINGLE, None),
    ("none", HALF, None),
    ("none", WINDOW, None),
    ("none", CAPPED, None),
    ("none", DROPOUT, None),
    # What raises gives nothing wrong, and training never calls with fewer queries than keys.
    ("raise for fewer queries", PACKED, None),
    ("raise for fewer queries", SINGLE, None),
    ("raise from fewer queries on", PACKED, "crash"),
    ("top-left", SINGLE, "numerics-fwd"),
    ("zeros", PACKED, "zeros"),
    ("zeros", HALF, "zeros"),
    ("detached", PACKED, "grad-detached"),
    ("no dk", PACKED, "grad-detached"),
    ("scale", PACKED, "numerics-fwd"),
    ("scale ignored", PACKED, "numerics-fwd"),
    ("low precision", PACKED, "numerics-fwd"),
    ("top-left", PACKED, "numerics-fwd"),
    ("no causal mask", PACKED, "numerics-fwd"),
    ("no causal mask", HALF, "numerics-fwd"),
    ("causal one too far", PACKED, "numerics-fwd"),
    ("causal one too far", HALF, "numerics-fwd"),
    ("heads swapped", PACKED, "numerics-fwd"),
    ("heads swapped", HALF, "numerics-fwd"),
    ("base of softmax", PACKED, "numerics-fwd"),
    ("base of softmax", HALF, "numerics-fwd"),
    ("one added", PACKED, "numerics-fwd"),
    ("no maximum", PACKED, "nan"),
    ("no maximum", HALF, "nan"),
    ("nan at 192", PACKED, "nan"),
    ("nan at 192", SINGLE, "nan"),
    ("nan at 37", PACKED, "nan"),
    ("nan at 37", SINGLE, "nan"),
    ("tail", PACKED, "numerics-fwd"),
    ("tail", SINGLE, "numerics-fwd"),
    ("tail", HALF, "numerics-fwd"),
    ("first key lost", PACKED, "numerics-fwd"),
    ("first key lost", HALF, "numerics-fwd"),
    ("wrong from 200 on", SINGLE, "numerics-fwd"),
    ("shape", SINGLE, "numerics-fwd"),
    ("memory layout", PACKED, "numerics-fwd"),
    ("memory layout", SINGLE, "numerics-fwd"),
    ("no window", WINDOW, "numerics-fwd"),
    ("window one too wide", WINDOW, "numerics-fwd"),
    ("window one too narrow", WINDOW, "numerics-fwd"),
    ("no softcap", CAPPED, "numerics-fwd"),
    ("softcap without gradient", CAPPED, "numerics-bwd"),
    ("dv times 1.05", PACKED, "numerics-bwd"),
    ("dq negated", PACKED, "numerics-bwd"),
    ("dq negated", HALF, "numerics-bwd"),
    ("dk nan", PACKED, "nan"),
    ("dq without the tail", PACKED, "numerics-bwd"),
    ("dk of one head in a group", PACKED, "numerics-bwd"),
    ("dk of one head in a group", HALF, "numerics-bwd"),
    ("leak", PACKED, "packing-not-isolated"),
    ("leak", HALF, "packing-not-isolated"),
    ("leak of one token", PACKED, "packing-not-isolated"),
    ("equal documents", PACKED, "packing-not-isolated"),
    ("longer max_seqlen", PACKED, "numerics-fwd"),
    ("documents past 32", PACKED, "numerics-fwd"),
    ("no dropout", DROPOUT, "dropout"),
    ("dropout not rescaled", DROPOUT, "numerics-fwd"),
    ("noise", PACKED, "nondeterministic"),
    ("raise", PACKED, "crash"),
    ("memory", PACKED, "oom"),
    ("abort", PACKED, "crash"),
    ("exit", PACKED, "crash"),
    ("scale", HALF, "numerics-bwd"),
    ("dv times 1.05", HALF, "numerics-bwd"),
    ("leak of one token", HALF, "packing-not-isolated"),
]
SMALL = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False, sequence_len=64,
    rows=2,
)  # fmt: skip
EVERY = replace(SMALL, every_length=True)
BATCH = a_geometry(heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, sequence_len=64)
EQUAL = a_geometry(heads=4, kv_heads=4, head_dim_qk=16, head_dim_v=16, sequence_len=64)
WIDE = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False, window=64,
    sequence_len=160,
)  # fmt: skip
FOUR = a_geometry(heads=8, kv_heads=4, head_dim_qk=16, head_dim_v=16, sequence_len=256)
BF16 = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False,
    dtype="bfloat16", sequence_len=64,
)  # fmt: skip
LONG = replace(BF16, sequence_len=768)
CAST = a_geometry(
    heads=4, kv_heads=2, head_dim_qk=16, head_dim_v=16, dtype="bfloat16", sequence_len=64,
    autocast=True,
)  # fmt: skip

# Kernels that are right in most calls: by length, by the number of documents, heads or rows, by
# memory layout, by what needs a gradient, by what was called before.
SLY_FAULTS = [
    ("none", SMALL, None),
    ("none", BATCH, None),
    ("none", EQUAL, None),
    ("none", WIDE, None),
    ("none", EVERY, None),
    ("none", LONG, None),
    ("none", CAST, None),
    ("odd lengths", BATCH, "numerics-fwd"),
    ("more than 128", SMALL, "numerics-fwd"),
    ("length 64", SMALL, "numerics-fwd"),
    ("length 101", EVERY, "numerics-fwd"),
    ("tail at 101", EVERY, "numerics-fwd"),
    ("as many key heads", EQUAL, "numerics-fwd"),
    ("fewer key heads", BATCH, "numerics-fwd"),
    ("heads past 2", EQUAL, "numerics-fwd"),
    ("rows take the first one's keys", BATCH, "numerics-fwd"),
    ("rows of more than 200 tokens take the first one's keys", BATCH, "numerics-fwd"),
    ("a lone token at the end", SMALL, "numerics-fwd"),
    ("a lone token without gradient", SMALL, "numerics-bwd"),
    ("two documents", SMALL, "numerics-fwd"),
    ("three documents", SMALL, "numerics-fwd"),
    ("boundaries of its own for k", SMALL, "numerics-fwd"),
    ("nine documents", EVERY, "numerics-fwd"),
    ("documents past 64", SMALL, "numerics-fwd"),
    ("documents past 250", SMALL, "numerics-fwd"),
    ("two full rows", SMALL, "numerics-fwd"),
    ("first of three without gradient", SMALL, "numerics-bwd"),
    ("the row's first token seen by all", SMALL, "numerics-fwd"),
    ("leak backward", SMALL, "packing-not-isolated"),
    ("leak backward", BF16, "packing-not-isolated"),
    ("faint leak", BF16, "packing-not-isolated"),
    ("window past 40", WIDE, "numerics-fwd"),
    ("v laid out as q", BATCH, "numerics-fwd"),
    ("v cut at 8", SMALL, "numerics-fwd"),
    ("sums in bfloat16", LONG, "numerics-fwd"),
    # No kernel of the hub runs under autocast: torch's operations in it would be cast.
    ("under autocast", CAST, None),
    ("float32", BF16, "numerics-fwd"),
    ("float64", BATCH, "numerics-fwd"),
    ("noise", BATCH, "numerics-fwd"),
    ("dq times 1.02", BF16, "numerics-bwd"),
    ("dk times 1.02", BF16, "numerics-bwd"),
    ("dv times 1.02", BF16, "numerics-bwd"),
    ("dk one head off", BATCH, "numerics-bwd"),
    ("first dv lost", BATCH, "numerics-bwd"),
    ("dq of the last token", SMALL, "numerics-bwd"),
    ("contiguous dout", BATCH, "numerics-bwd"),
    ("expanded dout", BATCH, "numerics-bwd"),
    ("gradients for v alone", BATCH, "numerics-bwd"),
    ("without gradients", BATCH, "numerics-fwd"),
    ("changes q", BATCH, "numerics-fwd"),
    ("changes v", BATCH, "numerics-fwd"),
    ("changes dout", BATCH, "numerics-fwd"),
    ("cu_seqlens changed", SMALL, "numerics-fwd"),
    ("out in q", BATCH, "numerics-fwd"),
    ("out in one buffer", BATCH, "numerics-fwd"),
    ("dq in one buffer", BATCH, "numerics-bwd"),
    ("state kept outside", BATCH, "numerics-bwd"),
    ("keys kept by shape", BATCH, "numerics-fwd"),
    ("every tenth call", BATCH, "numerics-fwd"),
    ("none", FOUR, None),
    ("none", HALF, None),
    ("documents kept by shape", SMALL, "numerics-fwd"),
    ("documents kept by tokens and longest", SMALL, "numerics-fwd"),
    ("third key head past 170", FOUR, "numerics-fwd"),
    ("third key head past 170", replace(FOUR, packing=True, dense=False), "numerics-fwd"),
    ("state of the last 16 calls", BATCH, "numerics-bwd"),
    ("small dout lost", BF16, "grad-detached"),
    ("small dout lost", BATCH, "numerics-bwd"),
    ("dout in half", BF16, "numerics-bwd"),
    ("large dout cut", BATCH, "numerics-bwd"),
    ("seeds", BATCH, "numerics-fwd"),
    ("seeds backward", SMALL, "numerics-fwd"),
    ("in inference mode", BATCH, "numerics-fwd"),
    ("nothing requires gradients", BATCH, "numerics-fwd"),
    ("below what learns", SMALL, "numerics-fwd"),
    ("checkpointed", BATCH, "numerics-bwd"),
    ("checkpointed", SMALL, "numerics-bwd"),
    ("no query of zeros", BATCH, "nan"),
    ("no query of zeros", SMALL, "nan"),
    ("v cut at 300", BATCH, "numerics-fwd"),
    ("v cut at 300", BF16, "numerics-fwd"),
    ("v cut at 300", replace(BF16, dtype="float16"), "numerics-fwd"),
    ("none", replace(BF16, dtype="float16"), None),
    ("scale cut at 1", BATCH, "numerics-fwd"),
    ("scale cut at 1", BF16, "numerics-fwd"),
    ("none", replace(EVERY, sequence_len=700), None),
    ("96s past 512", replace(EVERY, sequence_len=700), "numerics-fwd"),
    ("96s past 512", replace(BATCH, every_length=True, sequence_len=700), "numerics-fwd"),
    ("scores cut at 160", BATCH, "numerics-fwd"),
    ("scores cut at 160", BF16, "numerics-fwd"),
    ("scores cut at 160", replace(BF16, dtype="float16"), "numerics-fwd"),
]
Row = tuple[Path, str, Geometry, str | None]


def one_of_each(rows: list[Row]) -> list[Row]:
    """Return the rows of right kernels, and each fault once for each reason.

    Of a fault's geometries another one is kept each time, and what only one row has always.
    """
    uses = Counter(geometry for _, _, geometry, _ in rows)
    alike: dict[tuple[Path, str, str], list[Row]] = {}
    for row in rows:
        source, fault, geometry, code = row
        if code is not None and uses[geometry] > 1:
            alike.setdefault((source, fault, code), []).append(row)
    several = [same for same in alike.values() if len(same) > 1]
    left_out = [
        row
        for number, same in enumerate(several)
        for place, row in enumerate(same)
        if place != number % len(same)
    ]
    return [row for row in rows if row not in left_out]


EVERY_ROW: list[Row] = [(WRONG, *row) for row in FAULTS] + [(SLY, *row) for row in SLY_FAULTS]
ALL = EVERY_ROW if os.environ.get("PROOFS") == "all" else one_of_each(EVERY_ROW)
NAMES = [f"wrong/kernel-{number}" for number in range(len(ALL))]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    rows = zip(NAMES, ALL, strict=True)
    return prove_all(tmp_path_factory.mktemp("kernels"), {name: row[:3] for name, row in rows})


# The first test waits for all proofs: a minute of CPU, on machines that have other work too.
pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        pytest.param(
            name,
            code,
            id=f"{fault}, {'packed' if geometry.packing else 'single'} {geometry.dtype}: "
            f"{code or 'passes'}",
        )
        for name, (_, fault, geometry, code) in zip(NAMES, ALL, strict=True)
    ],
)
def test_each_kernel_is_judged_by_what_is_wrong_with_it(
    proofs: dict[str, Proof], name: str, code: str | None
) -> None:
    codes = [reason.code for reason in proofs[name].reasons]
    assert codes == [] if code is None else code in codes, proofs[name].reasons


def test_each_fault_is_among_those_that_are_proven() -> None:
    every = {(source, fault, code) for source, fault, _, code in EVERY_ROW}
    assert {(source, fault, code) for source, fault, _, code in one_of_each(EVERY_ROW)} == every
    geometries = {geometry for _, _, geometry, _ in EVERY_ROW}
    assert {geometry for _, _, geometry, _ in one_of_each(EVERY_ROW)} == geometries


def test_what_a_kernel_cannot_do_is_a_note_of_its_proof(proofs: dict[str, Proof]) -> None:
    (name, *_) = [
        name
        for name, (_, fault, geometry, _) in zip(NAMES, ALL, strict=True)
        if (fault, geometry) == ("raise for fewer queries", PACKED)
    ]
    note = "raises where training never calls it: 13 queries, 77 keys: NotImplementedError: as many"
    assert proofs[name].note.startswith(note)
    assert proofs[NAMES[0]].note == ""
    assert proofs[name].cases == proofs[NAMES[0]].cases - 1

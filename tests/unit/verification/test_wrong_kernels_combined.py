"""Test that proofs find kernels that are wrong only for a combination of a call's properties.

One child process proves them all, on a run of eight heads, two key heads and 832 tokens: every
third of them, and all with PROOFS=all (`make test/proofs`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from run_facts import a_geometry
from served_kernels import prove_all

from attnimg.run_facts import Proof

SOURCE = Path(__file__).parents[2] / "fixtures/wrong_kernels/products.py"
PACKED = a_geometry(
    heads=8, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False,
    sequence_len=832,
)  # fmt: skip
SINGLE = replace(PACKED, packing=False, dense=True)
BF16 = replace(PACKED, dtype="bfloat16", rows=2)

ALL = [
    ("none", PACKED, None),
    ("none", SINGLE, None),
    ("none", BF16, None),
    ("raises for empty documents", PACKED, None),
    ("empty documents hide the next", PACKED, "numerics-fwd"),
    ("group of 4 past 800", PACKED, "numerics-fwd"),
    ("group of 4 past 800", SINGLE, "numerics-fwd"),
    ("all heads at the whole row", PACKED, "numerics-fwd"),
    ("all heads at the whole row of one document", BF16, "numerics-fwd"),
    ("heads and more than 8 documents", PACKED, "numerics-fwd"),
    ("more than 16 documents of all heads", BF16, "numerics-fwd"),
    ("no gradients and more than 8 documents", BF16, "numerics-fwd"),
    ("no gradients and 300 documents", PACKED, "numerics-fwd"),
    ("no gradients and long rows", PACKED, "numerics-fwd"),
    ("single tokens of all heads", PACKED, "numerics-fwd"),
    ("the second call of a long row", SINGLE, "numerics-fwd"),
    ("a document that begins past 500 with all heads", PACKED, "numerics-fwd"),
    ("64 comes fourth", PACKED, "numerics-fwd"),
    ("17 comes second", PACKED, "numerics-fwd"),
    ("129 at the end", PACKED, "numerics-fwd"),
    ("a long document behind others", PACKED, "numerics-fwd"),
    ("k alone learns", SINGLE, "numerics-fwd"),
    ("k and v learn", PACKED, "numerics-bwd"),
    ("k and v learn, dv", SINGLE, "numerics-bwd"),
    ("q and k learn", SINGLE, "numerics-bwd"),
    ("k learns", PACKED, "numerics-bwd"),
    ("q learns", SINGLE, "numerics-bwd"),
    ("k and v learn and long rows", PACKED, "numerics-bwd"),
    ("dk of group of 4 past 800", PACKED, "numerics-bwd"),
    ("dq of all heads and documents", BF16, "numerics-bwd"),
    ("dv of all heads at the whole row", PACKED, "numerics-bwd"),
    ("rows past 700 add nothing to dk", PACKED, "numerics-bwd"),
    ("rows of the middle add nothing to dv", SINGLE, "numerics-bwd"),
    ("writes q without gradients", PACKED, "numerics-fwd"),
    ("writes v of long rows without gradients", SINGLE, "numerics-fwd"),
    ("cu_seqlens moved without gradients", PACKED, "numerics-fwd"),
    ("scores cut at 250", PACKED, "numerics-fwd"),
    ("scores cut at 400", BF16, "numerics-fwd"),
    ("scores cut at -250", SINGLE, "numerics-fwd"),
    ("hidden scores are -300", PACKED, "numerics-fwd"),
    ("leaks its outputs", PACKED, "process-state"),
    ("scale 1.5 % off in the output alone", BF16, "numerics-fwd"),
    ("the key before a border of tiles is hidden", BF16, "numerics-fwd"),
    ("q learns and long rows", SINGLE, "numerics-bwd"),
    ("from the last 12 calls on", PACKED, "numerics-fwd"),
    ("rows of 256n+1 tokens", PACKED, "numerics-fwd"),
    ("sums of gradients in bfloat16", replace(BF16, head_dim_qk=32, head_dim_v=32), "numerics-bwd"),
    ("q is twice as large until the backward pass", SINGLE, "numerics-fwd"),
    ("one buffer without gradients", SINGLE, "numerics-fwd"),
]
RIGHT = [row for row in ALL if row[2] is None]
WRONG = [row for row in ALL if row[2] is not None]
FAULTS = RIGHT + (WRONG if os.environ.get("PROOFS") == "all" else WRONG[::3])
NAMES = [f"products/kernel-{number}" for number in range(len(FAULTS))]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    rows = zip(NAMES, FAULTS, strict=True)
    return prove_all(
        tmp_path_factory.mktemp("kernels"),
        {name: (SOURCE, fault, geometry) for name, (fault, geometry, _) in rows},
    )


# The first test waits for all proofs.
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
        for name, (fault, geometry, code) in zip(NAMES, FAULTS, strict=True)
    ],
)
def test_each_wrong_kernel_is_refused_and_each_right_one_passes(
    proofs: dict[str, Proof], name: str, code: str | None
) -> None:
    codes = [reason.code for reason in proofs[name].reasons]
    assert codes == [] if code is None else code in codes, proofs[name].reasons

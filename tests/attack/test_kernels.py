"""Test that kernels that round differently pass a proof, and that wrong ones do not.

One child process proves them, as `verify` does; `make attack` proves all of them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from generated import SECONDS
from run_facts import a_geometry
from served_kernels import prove_served

from attnimg.run_facts import Geometry, Proof

SOURCE = Path(__file__).parents[1] / "fixtures/wrong_kernels/variants.py"

PACKED = a_geometry(packing=True, dense=False, sequence_len=64, rows=2)
BATCH = a_geometry(sequence_len=64, rows=2)
LONG = replace(PACKED, sequence_len=832)
HALF = replace(PACKED, dtype="bfloat16", heads=8, head_dim_qk=32, head_dim_v=32)
FP16 = replace(HALF, dtype="float16", heads=4)
LONG_HALF = replace(HALF, sequence_len=832)
WINDOW = replace(PACKED, window=64, sequence_len=160)
CAPPED = replace(BATCH, softcap=30.0)
CAPPED_HALF = replace(CAPPED, dtype="bfloat16")
SINKS = replace(PACKED, sinks=True)
SINKS_HALF = replace(SINKS, dtype="bfloat16", window=32)
THREE = replace(PACKED, heads=6)
EQUAL = replace(BATCH, kv_heads=4)
ODD_SIZE = replace(BATCH, head_dim_qk=24, head_dim_v=24)
DROPOUT = replace(PACKED, head_dim_qk=64, head_dim_v=64, dropout=0.1)

RIGHT: list[tuple[str, Geometry]] = [
    ("none", SINKS),
    ("none", DROPOUT),
    ("blocks of 16 keys", CAPPED),
    ("blocks of 128 keys, the last one first", SINKS_HALF),
    ("exp2", PACKED),
    ("exp2", SINKS_HALF),
    ("weights rounded", FP16),
    ("weights and gradients of scores rounded", HALF),
    ("weights and gradients of scores rounded", CAPPED_HALF),
    ("the output in float32 for the gradients", HALF),
    ("dk and dv of each head rounded", HALF),
    ("sums in a random order", THREE),
    ("rescaled from a factor of 256 on", LONG_HALF),
    ("two halves of the keys, then merged", WINDOW),
    ("scale in q, rounded", HALF),
    ("float64", ODD_SIZE),
    ("weights divided before the product", FP16),
]
WRONG: list[tuple[str, Geometry]] = [
    ("rows at 128 n + 1 lose a key", PACKED),
    ("head off by one in groups of 3", THREE),
    ("the maximum is at least 0", PACKED),
    ("log-sums in base 2 in the backward pass", PACKED),
    ("log-sums in half precision", PACKED),
    ("log-sums in one buffer", BATCH),
    ("dk times the scale again in groups", HALF),
    ("offsets of keys in 16 bits", HALF),
    ("the last document is left out", PACKED),
    ("no dk after an empty document", PACKED),
    ("a document's first token sees the one before", HALF),
    ("rows of the grid from the first document", PACKED),
    ("k overwritten in the backward pass", BATCH),
    ("dq added to the last call's", PACKED),
    ("the window of a tile's first query", WINDOW),
    ("the window of the row's last queries", WINDOW),
    ("window rounded up to 8", WINDOW),
    ("no window without gradients", WINDOW),
    ("sinks twice", SINKS_HALF),
    ("sinks times the scale", SINKS),
    ("the first sink for all heads", SINKS),
    ("no sinks past the fourth document", SINKS_HALF),
    ("dsinks of the last 64 queries", SINKS),
    ("dsinks with the wrong sign", SINKS_HALF),
    ("a soft cap of 50", CAPPED),
    ("derivative of the soft cap squared", CAPPED_HALF),
    ("no soft cap without gradients", CAPPED),
    ("a lost write in dv", PACKED),
    ("NaN becomes 0", PACKED),
    ("exp 1e-3 off", PACKED),
    ("exp 4e-2 off", HALF),
    ("q and k in TF32", PACKED),
    ("weights in 3 bits", HALF),
    ("gradients of scores in 3 bits", HALF),
    ("small weights are 0", LONG_HALF),
    ("head sizes padded without zeros", ODD_SIZE),
    ("the storage offset of k is ignored", BATCH),
    ("heads shifted without groups", EQUAL),
    ("another dropout mask in the backward pass", DROPOUT),
    ("dropout not rescaled in the backward pass", DROPOUT),
    ("whole rows dropped", DROPOUT),
    ("whole keys dropped", DROPOUT),
    ("delta of another head", HALF),
    ("delta of a tile's first query", PACKED),
    ("dk without the last query at 64 n + 1", PACKED),
    ("dk of queries past 700 at half size", LONG),
    ("three heads of a group in dk and dv", HALF),
    ("dk of another row", BATCH),
    ("the last row's output for all", BATCH),
    ("causal in blocks of 8", HALF),
    ("no causal mask in the last tile of 64 n", BATCH),
    ("not rescaled from the third block on", HALF),
    ("the scale rounded in the backward pass", ODD_SIZE),
    ("dk in blocks of bfloat16", LONG_HALF),
    ("dv in blocks of bfloat16", LONG_HALF),
    ("two tokens do not see one another", HALF),
    ("keys past 64 tiles of 8", LONG),
    ("in inference mode on long rows", LONG),
]
EVERY = [(*row, False) for row in RIGHT] + [(*row, True) for row in WRONG]
# Without ATTACK_SECONDS: every tenth one, and those that only one rule refuses.
SOME = {"whole keys dropped", "dk in blocks of bfloat16", "in inference mode on long rows"}
VARIANTS = [
    row for number, row in enumerate(EVERY) if SECONDS or number % 10 == 1 or row[0] in SOME
]
NAMES = [f"variants/kernel-{number}" for number in range(len(VARIANTS))]

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> list[Proof]:
    kernels = [
        (name, SOURCE, variant, geometry)
        for name, (variant, geometry, _) in zip(NAMES, VARIANTS, strict=True)
    ]
    return prove_served(tmp_path_factory.mktemp("kernels"), kernels)


@pytest.mark.parametrize("wrong", [False, True], ids=["right kernels", "wrong kernels"])
def test_kernels(
    proofs: list[Proof], wrong: bool, record_property: Callable[[str, Any], None]
) -> None:
    judged = [
        (variant, geometry, proof)
        for (variant, geometry, is_wrong), proof in zip(VARIANTS, proofs, strict=True)
        if is_wrong == wrong
    ]
    failed = [
        f"{variant} ({geometry.dtype}, {geometry.sequence_len} tokens): {proof.reasons}"
        for variant, geometry, proof in judged
        if proof.passed == wrong or any(reason.code == "crash" for reason in proof.reasons)
    ]
    kind = "wrong kernels" if wrong else "right kernels"
    record_property("attack", [kind, len(judged), len(judged) - len(failed), "all"])
    assert not failed, "\n".join(failed)


def test_each_variant_of_the_fixture_is_proven() -> None:
    specification = importlib.util.spec_from_file_location("variants", SOURCE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert {variant for variant, _ in RIGHT} == {"none", *module.RIGHT}
    source = SOURCE.read_text(encoding="utf-8")
    assert not [variant for variant, _ in WRONG if f'"{variant}"' not in source]
    assert len({variant for variant, _ in WRONG}) == len(WRONG)

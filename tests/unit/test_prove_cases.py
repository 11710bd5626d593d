"""The probes are of the run's own geometry, and show what could be wrong with a kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from run_facts import a_context, a_geometry, a_problem

from attnimg.facts import Geometry, LayerGroup, Model
from attnimg.prove.cases import cases_of
from attnimg.prove.geometry import geometries_of
from attnimg.prove.inputs import draw
from attnimg.prove.shown import BUDGET, longest_of

LLAMA = a_geometry(
    heads=32, kv_heads=8, head_dim_qk=64, head_dim_v=64, packing=True, sequence_len=2048
)
MLA = replace(LLAMA, heads=8, head_dim_qk=24, head_dim_v=16, packing=False)


def lengths(geometry: Geometry) -> set[int]:
    return {n for case in cases_of(geometry, device="cpu") for n in case.lengths}


@pytest.mark.parametrize("geometry", [LLAMA, MLA], ids=["packed", "one document a row"])
def test_lengths_are_odd_and_reach_the_runs_own(geometry: Geometry) -> None:
    assert {1, 2, 17, 61, 127, 192, 2048} <= lengths(geometry)
    assert max(lengths(geometry)) == geometry.sequence_len


def test_a_long_run_is_probed_up_to_the_memory_budget() -> None:
    geometry = replace(LLAMA, sequence_len=1 << 20)
    longest = longest_of(geometry, device="cpu")
    assert 2 * longest**2 <= BUDGET["cpu"] < 2 * (longest + 1) ** 2
    assert max(lengths(geometry)) == longest


def test_the_number_of_query_heads_to_a_key_head_is_kept() -> None:
    short = [case for case in cases_of(LLAMA, device="cpu") if max(case.lengths) <= 72]
    assert {case.geometry.heads // case.geometry.kv_heads for case in short} == {4, 2}
    assert any(case.geometry == LLAMA for case in short), "one probe has all heads"


def test_a_packed_run_with_a_dense_entry_is_probed_both_ways() -> None:
    assert {case.packed for case in cases_of(LLAMA, device="cpu")} == {True, False}
    varlen_only = replace(LLAMA, dense=False)
    assert {case.packed for case in cases_of(varlen_only, device="cpu")} == {True}


def test_a_window_is_shorter_than_the_short_probes_and_the_runs_own_in_the_longest() -> None:
    cases = cases_of(replace(LLAMA, window=1024), device="cpu")
    longest = [c for c in cases if c.lengths[0] == 2048 and c.packed]
    assert {case.geometry.window for case in longest} == {1024}
    first = cases[0]
    assert first.geometry.window is not None
    assert first.geometry.window < 192


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "single"])
def test_a_kernel_that_nobody_has_read_sees_every_length(packing: bool) -> None:
    geometry = replace(LLAMA, packing=packing, dense=not packing, every_length=True)
    seen = {n for case in cases_of(geometry, device="cpu") for n in case.lengths}
    assert set(range(1, 513)) <= seen
    assert {1023, 1024, 1025} <= seen


def test_rows_that_a_packed_run_lays_one_after_another_are_probed_so() -> None:
    totals = {
        rows: max(sum(c.lengths) for c in cases_of(replace(LLAMA, rows=rows), device="cpu"))
        for rows in (1, 2)
    }
    assert totals == {1: 2048 + 68, 2: 2 * 2048}


def test_fused_inputs_are_views_of_one_tensor() -> None:
    case = next(c for c in cases_of(LLAMA, device="cpu") if c.layout == "fused")
    inputs = draw(case, device="cpu")
    assert not inputs.q.transpose(1, 2).is_contiguous()
    storages = {x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)}
    assert len(storages) == 1


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [pytest.param("negative", -200, -88, id="below what exp holds"),
     pytest.param("large", 160, 256, id="above what exp holds")],
)  # fmt: skip
def test_log_sum_exp_leaves_float32(scores: str, low: float, high: float) -> None:
    case = next(c for c in cases_of(LLAMA, device="cpu") if c.scores == scores)
    inputs = draw(case, device="cpu")
    k = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
    total = (inputs.q @ k.transpose(-1, -2) * inputs.scale).double().logsumexp(-1)
    assert ((total > low) & (total < high)).all()


def test_keys_beyond_a_boundary_would_take_most_of_the_weight() -> None:
    case = next(c for c in cases_of(LLAMA, device="cpu") if c.repeated and c.packed)
    inputs = draw(case, device="cpu")
    # A query of the last but one document, of 67 tokens, and the last key of the one before it.
    first = int((inputs.documents[0] == inputs.documents[0].max() - 1).int().argmax())
    query = inputs.q[0, 0, first + 2].double()
    scores = inputs.k[0, 0].double() @ query * inputs.scale
    assert scores.softmax(-1)[first - 1] > 0.2


def test_inputs_are_the_same_each_time() -> None:
    case = cases_of(LLAMA, device="cpu")[0]
    assert torch.equal(draw(case, device="cpu").q, draw(case, device="cpu").q)


def test_equal_layers_are_proven_once() -> None:
    group = LayerGroup(count=3, heads=8, kv_heads=8, head_dim_qk=64, head_dim_v=64)
    model = Model(type="x", layers=(group, replace(group, count=9), replace(group, window=128)))
    context = a_context(dtype="bfloat16", sequence_len=512)
    found = geometries_of(
        a_problem(model=model), context, dense=True, deterministic=False, every_length=False
    )
    assert [geometry.window for geometry in found] == [None, 128]
    assert {(g.dtype, g.packing, g.sequence_len) for g in found} == {("bfloat16", True, 512)}

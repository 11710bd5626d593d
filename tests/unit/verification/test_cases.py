"""The probes are of the run's own geometry, and show what could be wrong with a kernel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from run_facts import a_backend, a_context, a_geometry, a_problem

from attnimg.run_facts import Geometry, LayerGroup, Model
from attnimg.verification.calls import draw_inputs
from attnimg.verification.cases import (
    CPU,
    choose_budget,
    full_row_length,
    list_cases,
    longest_document,
)
from attnimg.verification.proofs import list_geometries

LLAMA = a_geometry(
    heads=32, kv_heads=8, head_dim_qk=64, head_dim_v=64, packing=True, sequence_len=2048
)
MLA = replace(LLAMA, heads=8, head_dim_qk=24, head_dim_v=16, packing=False)


def lengths(geometry: Geometry) -> set[int]:
    return {n for case in list_cases(geometry, budget=CPU) for n in case.lengths}


@pytest.mark.parametrize("geometry", [LLAMA, MLA], ids=["packed", "one document a row"])
def test_lengths_are_odd_and_reach_the_runs_own(geometry: Geometry) -> None:
    assert {1, 2, 17, 61, 127, 192, 2048} <= lengths(geometry)
    assert max(lengths(geometry)) == geometry.sequence_len


def test_a_long_run_is_probed_up_to_the_memory_budget() -> None:
    geometry = replace(LLAMA, sequence_len=1 << 20)
    longest = longest_document(geometry, CPU)
    assert 2 * longest**2 <= CPU.stored_scores < 2 * (longest + 1) ** 2
    assert max(lengths(geometry)) == longest


def test_the_number_of_query_heads_to_a_key_head_is_kept() -> None:
    short = [case for case in list_cases(LLAMA, budget=CPU) if max(case.lengths) <= 72]
    assert {case.geometry.heads // case.geometry.kv_heads for case in short} == {4, 2}
    assert any(case.geometry == LLAMA for case in short), "one probe has all heads"


def test_a_packed_run_with_a_dense_entry_is_probed_both_ways() -> None:
    assert {case.packed for case in list_cases(LLAMA, budget=CPU)} == {True, False}
    varlen_only = replace(LLAMA, dense=False)
    assert {case.packed for case in list_cases(varlen_only, budget=CPU)} == {True}


def test_a_window_is_shorter_than_the_short_probes_and_the_runs_own_in_the_longest() -> None:
    cases = list_cases(replace(LLAMA, window=1024), budget=CPU)
    longest = [c for c in cases if c.lengths[0] == 2048 and c.packed]
    assert {case.geometry.window for case in longest} == {1024}
    first = cases[0]
    assert first.geometry.window is not None
    assert first.geometry.window < 192


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "single"])
def test_each_two_of_q_k_and_v_occur_in_each_pair_of_memory_layouts(packing: bool) -> None:
    geometry = replace(LLAMA, packing=packing, dense=not packing)
    equals = {"fused": "ppp", "heads-first": "hhh", "tokens-first": "ttt"}
    seen = {equals.get(case.layout, case.layout) for case in list_cases(geometry, budget=CPU)}
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert len({(letters[one], letters[other]) for letters in seen}) == 9


def test_neighbours_of_equal_length_are_probed_with_all_heads() -> None:
    packed = [case for case in list_cases(LLAMA, budget=CPU) if case.packed]
    rows = [case.lengths for case in packed if case.geometry.heads == LLAMA.heads]
    pairs = {pair for row in rows for pair in pairwise(row)}
    assert {(1, 1), (2, 2), (3, 3), (31, 31)} <= pairs
    assert max(map(len, rows)) > 32


def test_each_number_of_documents_is_probed_with_all_heads_of_a_kernel_nobody_has_read() -> None:
    geometry = replace(LLAMA, every_length=True)
    cases = [case for case in list_cases(geometry, budget=CPU) if case.packed]
    counts = {len(case.lengths) for case in cases if case.geometry.heads == LLAMA.heads}
    assert set(range(2, 33)) <= counts


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "single"])
def test_a_kernel_that_nobody_has_read_sees_every_length(packing: bool) -> None:
    geometry = replace(LLAMA, packing=packing, dense=not packing, every_length=True)
    seen = {n for case in list_cases(geometry, budget=CPU) for n in case.lengths}
    assert set(range(1, 513)) <= seen
    assert {1023, 1024, 1025} <= seen


def test_rows_that_a_packed_run_lays_one_after_another_are_probed_so() -> None:
    totals = {
        rows: max(sum(c.lengths) for c in list_cases(replace(LLAMA, rows=rows), budget=CPU))
        for rows in (1, 2)
    }
    assert totals == {1: 2048, 2: 2 * 2048}


@pytest.mark.parametrize("tile", [16, 32, 64, 128, 256])
def test_packed_rows_end_at_a_border_of_tiles_and_one_token_to_either_side(tile: int) -> None:
    cases = list_cases(replace(LLAMA, dense=False), budget=CPU)
    ends = {sum(case.lengths) % tile for case in cases if sum(case.lengths) > 128}
    assert {0, 1, tile - 1} <= ends


WHOLE = replace(LLAMA, heads=8, kv_heads=2, sequence_len=1024)
FULL = ("dq", "dk", "dv")


@pytest.mark.parametrize(
    ("geometry", "lengths"),
    [
        pytest.param(WHOLE, {1: (1024,)}, id="packed, one document"),
        pytest.param(replace(WHOLE, packing=False), {1: (1024,)}, id="a batch of one row"),
        pytest.param(
            replace(WHOLE, heads=2, packing=False, rows=3), {3: (1024,) * 3}, id="a batch of three"
        ),
    ],
)
def test_a_whole_row_has_all_heads_and_the_runs_length(
    geometry: Geometry, lengths: dict[int, tuple[int, ...]]
) -> None:
    whole = [case for case in list_cases(geometry, budget=CPU) if case.extra_gradients]
    assert {case.geometry for case in whole} == {geometry}
    assert set(lengths.values()) <= {case.lengths for case in whole}
    assert all(set(case.extra_gradients) < set(FULL) for case in whole)


@pytest.mark.parametrize(("heads", "rows", "total"), [(8, 1, 1024), (8, 2, 1024), (2, 2, 2048)])
def test_a_whole_packed_row_has_many_documents(heads: int, rows: int, total: int) -> None:
    geometry = replace(WHOLE, heads=heads, rows=rows)
    many = max((c for c in list_cases(geometry, budget=CPU) if c.extra_gradients),
               key=lambda case: len(case.lengths))  # fmt: skip
    assert sum(many.lengths) == total
    assert len(many.lengths) > 8
    assert 1 in many.lengths
    assert total // 2 <= max(many.lengths) <= geometry.sequence_len


def test_a_whole_row_is_shortened_to_the_budget() -> None:
    many_heads = replace(LLAMA, heads=128, kv_heads=8, sequence_len=4096)
    assert full_row_length(many_heads, CPU) == 338
    gpu = choose_budget(a_backend("flash_attention_2"), memory_bytes=80 << 30)
    assert full_row_length(replace(LLAMA, sequence_len=8192), gpu) == 8192
    assert full_row_length(replace(LLAMA, sequence_len=1 << 20), gpu) == 32768
    small = choose_budget(a_backend("eager"), memory_bytes=16 << 30)
    assert full_row_length(replace(LLAMA, sequence_len=8192), small) == 3663


def test_probes_include_documents_without_tokens_and_of_one() -> None:
    assert {0, 1} < lengths(LLAMA)
    (empty,) = (case for case in list_cases(LLAMA, budget=CPU) if 0 in case.lengths)
    assert not empty.in_training


@pytest.mark.parametrize(
    ("scores", "low", "high"), [("hundreds", 400, 900), ("below-hundreds", -900, -200)]
)
def test_scores_reach_the_hundreds_in_steps(scores: str, low: float, high: float) -> None:
    case = next(c for c in list_cases(LLAMA, budget=CPU) if c.scores == scores)
    inputs = draw_inputs(case, device="cpu")
    k = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
    found = (inputs.q @ k.transpose(-1, -2) * inputs.scale).double()
    same = inputs.documents[0, :, None] == inputs.documents[0]
    seen = same & torch.ones_like(same).tril()
    top = found.masked_fill(~seen, -torch.inf).amax(-1).median()
    assert low < top < high


def test_fused_inputs_are_views_of_one_tensor() -> None:
    case = next(c for c in list_cases(LLAMA, budget=CPU) if c.layout == "fused")
    inputs = draw_inputs(case, device="cpu")
    assert not inputs.q.transpose(1, 2).is_contiguous()
    storages = {x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)}
    assert len(storages) == 1


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [pytest.param("negative", -200, -88, id="below what exp holds"),
     pytest.param("large", 160, 256, id="above what exp holds")],
)  # fmt: skip
def test_log_sum_exp_leaves_float32(scores: str, low: float, high: float) -> None:
    case = next(c for c in list_cases(LLAMA, budget=CPU) if c.scores == scores)
    inputs = draw_inputs(case, device="cpu")
    k = inputs.k.repeat_interleave(inputs.q.shape[1] // inputs.k.shape[1], 1)
    total = (inputs.q @ k.transpose(-1, -2) * inputs.scale).double().logsumexp(-1)
    assert ((total > low) & (total < high)).all()


def test_keys_beyond_a_boundary_would_take_most_of_the_weight() -> None:
    case = next(c for c in list_cases(LLAMA, budget=CPU) if c.repeated and c.packed)
    inputs = draw_inputs(case, device="cpu")
    # A query of the last but one document, of 67 tokens, and the last key of the one before it.
    first = int((inputs.documents[0] == inputs.documents[0].max() - 1).int().argmax())
    query = inputs.q[0, 0, first + 2].double()
    scores = inputs.k[0, 0].double() @ query * inputs.scale
    assert scores.softmax(-1)[first - 1] > 0.2


def test_inputs_are_the_same_each_time() -> None:
    case = list_cases(LLAMA, budget=CPU)[0]
    assert torch.equal(draw_inputs(case, device="cpu").q, draw_inputs(case, device="cpu").q)


def test_equal_layers_are_proven_once() -> None:
    group = LayerGroup(count=3, heads=8, kv_heads=8, head_dim_qk=64, head_dim_v=64)
    model = Model(type="x", layers=(group, replace(group, count=9), replace(group, window=128)))
    context = a_context(dtype="bfloat16", sequence_len=512)
    found = list_geometries(
        a_problem(model=model), context, dense=True, deterministic=False, every_length=False
    )
    assert [geometry.window for geometry in found] == [None, 128]
    assert {(g.dtype, g.packing, g.sequence_len) for g in found} == {("bfloat16", True, 512)}

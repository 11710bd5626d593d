"""A proof of a kernel that is made for each shape, flex_attention's or cuDNN's, makes few."""

from __future__ import annotations

import pytest
import torch
from run_facts import a_backend, a_geometry

from attnimg.run_facts import Geometry
from attnimg.verification.cases import EDGES, Case, choose_budget, list_cases, reduce_shapes
from attnimg.verification.runner import COMPILING_S, TIMEOUT_S, Candidate, time_limits
from attnimg.verification.training_conditions import (
    RECOMPILE_LIMIT,
    builds_cudnn_plans,
    compiling_each_shape,
    is_compiled,
)

GPU = choose_budget(a_backend("flex_attention"), memory_bytes=80 << 30)


def list_shapes(cases: list[Case]) -> set[tuple[int | str, ...]]:
    """Return the distinct shapes of calls: batch, heads, key heads, queries, keys and layout."""
    found: set[tuple[int | str, ...]] = set()
    for case in cases:
        rows, keys = (
            (1, sum(case.lengths)) if case.packed else (len(case.lengths), max(case.lengths))
        )
        heads = case.geometry.heads, case.geometry.kv_heads
        found.add((rows, *heads, case.queries or keys, keys, case.layout))
    return found


def geometry(heads: int, kv_heads: int, *, packing: bool, dense: bool = True) -> Geometry:
    return a_geometry(
        heads=heads, kv_heads=kv_heads, head_dim_qk=64, head_dim_v=64, dtype="bfloat16",
        packing=packing, dense=dense, sequence_len=2048, rows=2,
    )  # fmt: skip


@pytest.mark.parametrize("heads", [(32, 8), (8, 2), (8, 8), (8, 1)])
@pytest.mark.parametrize(
    ("packing", "dense", "most"), [(True, False, 10), (False, True, 22), (True, True, 28)]
)
def test_there_are_few_shapes(
    heads: tuple[int, int], packing: bool, dense: bool, most: int
) -> None:
    cases = list_cases(geometry(*heads, packing=packing, dense=dense), budget=GPU)
    found = reduce_shapes(cases)
    assert len(list_shapes(found)) <= most
    assert len(list_shapes(found)) * 2 <= len(list_shapes(cases))


@pytest.mark.parametrize("packing", [True, False])
def test_edges_of_tiles_and_the_runs_own_length_are_kept(packing: bool) -> None:
    cases = reduce_shapes(list_cases(geometry(8, 2, packing=packing), budget=GPU))
    lengths = {n for case in cases for n in case.lengths}
    assert EDGES | {2048} <= lengths
    assert {case.scores for case in cases} >= {"spread", "negative", "large", "flat", "large-v"}
    if packing:
        assert set(range(1, 73)) <= lengths, "documents of every small length share rows"


def test_padded_rows_are_kept() -> None:
    cases = reduce_shapes(list_cases(geometry(8, 2, packing=False), budget=GPU))
    assert "padded rows" in {case.name for case in cases}


@pytest.mark.parametrize(
    ("name", "device", "compiled"),
    [("flex_attention", "cuda", True), ("flex_attention", "cpu", False), ("sdpa", "cuda", False)],
)
def test_only_flex_on_a_gpu_is_compiled_and_gets_more_time(
    name: str, device: str, compiled: bool
) -> None:
    assert is_compiled(a_backend(name), device=device) == compiled
    limits = time_limits(
        Candidate(backend=name, geometries=()), device=device, timeout_s=None, wall_s=900.0
    )
    extra = COMPILING_S if compiled else 0.0
    assert limits == (TIMEOUT_S[device] + extra, 900.0 + extra)


@pytest.mark.parametrize(
    ("name", "device", "capability", "few"),
    [
        ("sdpa", "cuda", (9, 0), True),
        ("sdpa", "cuda", (10, 0), True),
        ("sdpa", "cuda", (8, 0), False),
        ("sdpa", "cuda", (12, 0), False),
        ("sdpa", "cuda", None, False),
        ("sdpa", "cpu", None, False),
        ("sdpa_flash", "cuda", (9, 0), False),
        ("varlen_attn", "cuda", (9, 0), False),
    ],
)
def test_only_sdpa_where_it_takes_cudnn_first_is_shown_few_shapes(
    name: str, device: str, capability: tuple[int, int] | None, few: bool
) -> None:
    assert builds_cudnn_plans(a_backend(name), device=device, capability=capability) == few


def test_passing_dynamos_limit_raises_instead_of_running_uncompiled() -> None:
    with compiling_each_shape(a_backend("flex_attention"), device="cuda"):
        config = torch._dynamo.config
        assert config.recompile_limit == RECOMPILE_LIMIT
        assert config.fail_on_recompile_limit_hit
    assert not torch._dynamo.config.fail_on_recompile_limit_hit

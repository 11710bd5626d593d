"""Test that right kernels pass with few keys or scores in the hundreds, and wrong ones don't."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from noisy_proofs import load
from run_facts import a_backend, a_geometry

from attnimg.backends._transformers import attention_function
from attnimg.backends._varlen import FlashKernel
from attnimg.facts import AttentionFunction, Backend
from attnimg.run_facts import Geometry
from attnimg.verification.calls import Probe, call, draw_inputs, each_row
from attnimg.verification.candidate import prove_geometry
from attnimg.verification.cases import CPU, Case, list_cases
from attnimg.verification.checks import ATOL_SHIFTED, build_expected, check_values
from attnimg.verification.reference import reference
from attnimg.verification.rounding import rounding_bounds

# Kernels of tests/fixtures/noisy_kernels: P in half precision and exp2; P in float32, exp and small
# blocks; q rounded with its scale.
FAMILIES = {"fa2": 64, "online": 16, "triton": 64}
WINDOWS, DTYPES = (1, 2, 3, 4, 16), ("float32", "bfloat16", "float16")
EXTRAS: tuple[dict[str, Any], ...] = ({}, {"sinks": True}, {"softcap": 30.0})
# Tokens of the longest probe, so that the tests stay fast.
_LONGEST = 400
HEADS, HEAD_DIMS = ((4, 2), (2, 2), (3, 1)), (8, 32, 64, 256)


def _geometries() -> list[Geometry]:
    """Return each window in each precision once with each of EXTRAS, packed and not."""
    found = []
    for number, (window, dtype, extra) in enumerate(itertools.product(WINDOWS, DTYPES, EXTRAS)):
        heads, kv_heads = HEADS[number // 2 % 3]
        size, packing = HEAD_DIMS[(number + number // 4) % 4], number % 2 == 0
        found.append(
            a_geometry(
                heads=heads,
                kv_heads=kv_heads,
                head_dim_qk=size,
                head_dim_v=size,
                window=window,
                dtype=dtype,
                packing=packing,
                dense=not packing,
                sequence_len=64,
                **extra,
            )
        )
    return found


# Geometries of which one probe refused torch's sdpa, its math kernel and FlashAttention.
REFUSED = [
    a_geometry(heads=2, kv_heads=2, head_dim_qk=8, head_dim_v=8, window=2, sequence_len=64),
    a_geometry(
        heads=3, kv_heads=1, head_dim_qk=8, head_dim_v=8, window=16, packing=True, dense=False,
        sequence_len=64,
    ),
    a_geometry(
        heads=3, kv_heads=1, head_dim_qk=256, head_dim_v=256, window=1, dtype="bfloat16",
        sinks=True, sequence_len=64,
    ),
]  # fmt: skip


def _describe(geometry: Geometry) -> str:
    extra = "sinks" if geometry.sinks else "soft cap" if geometry.softcap else "plain"
    heads = f"{geometry.heads} heads on {geometry.kv_heads}"
    rows = "packed" if geometry.packing else "single"
    return (
        f"window {geometry.window}, {geometry.dtype}, {extra}, {heads} of {geometry.head_dim_qk},"
        f" {rows}"
    )


def _flash(family: str, *, fault: str = "none") -> tuple[Backend, AttentionFunction]:
    module = load(family, fault=fault, tile=FAMILIES[family])
    backend = a_backend("flash_attention_2")
    return backend, FlashKernel(
        backend=family, dense=module.flash_attn_func, varlen=module.flash_attn_varlen_func
    )


def _right_kernels(geometry: Geometry) -> list[tuple[Backend, AttentionFunction]]:
    """Return torch's kernels, and one of FAMILIES."""
    names = ["eager"] if geometry.sinks or geometry.softcap else ["eager", "sdpa", "sdpa_math"]
    backends = [a_backend(name) for name in names]
    of_torch = [(backend, attention_function(backend, trusted=True)) for backend in backends]
    return [*of_torch, _flash([*FAMILIES][(geometry.window or 0) % 3])]


def _cases(geometry: Geometry) -> list[Case]:
    """Return the probes of few keys and of large scores, of many equal ones the shortest."""
    cases = [
        case
        for case in list_cases(geometry, budget=CPU)
        if not case.extra_gradients
        and sum(case.lengths) <= _LONGEST
        and (case.scores in ATOL_SHIFTED or case.repeated or max(case.lengths) in (1, 2, 3, 17))
    ]
    assert {"negative", "large", "spread"} <= {case.scores for case in cases}
    return cases


def _faults(geometry: Geometry, kernels: list[tuple[Backend, AttentionFunction]]) -> list[str]:
    """Return the broken rules in one call of each kernel in each probe."""
    found = []
    for case in _cases(geometry):
        inputs = draw_inputs(case, device="cpu")
        results = (reference(case, inputs, dtype=x) for x in (torch.float64, inputs.q.dtype))
        expected = build_expected(*results)
        for backend, function in kernels:
            probe = Probe(function, backend, case, inputs)
            faults = check_values(probe, call(probe), expected)[1]
            found += [f"{backend.name}: {fault.reason.text}" for fault in faults]
    return found


@pytest.mark.parametrize("geometry", [*_geometries(), *REFUSED], ids=_describe)
def test_right_kernels_pass_with_few_keys_and_large_scores(geometry: Geometry) -> None:
    assert _faults(geometry, _right_kernels(geometry)) == []


WRONG = [
    pytest.param(fault, window, extra, dtype, id=f"{fault}, window {window}, {dtype}")
    for fault, windows, extra, dtypes in (
        ("dq times 1.001", (2, 3, 4), {}, ("float32",)),
        ("dq times 1.05", (2, 4), {}, ("bfloat16", "float16")),
        ("window one too wide", (1, 2, 4), {}, DTYPES),
        ("the oldest key is hidden", (2, 4), {}, DTYPES),
        ("no soft cap", (2, 4), {"softcap": 30.0}, DTYPES),
        ("soft cap without gradient", (2, 4), {"softcap": 30.0}, ("float32", "bfloat16")),
        ("window one too wide", (1,), {"sinks": True}, ("bfloat16",)),
    )
    for window, dtype in itertools.product(windows, dtypes)
]


@pytest.mark.parametrize(("fault", "window", "extra", "dtype"), WRONG)
def test_wrong_kernels_do_not(fault: str, window: int, extra: dict[str, Any], dtype: str) -> None:
    geometry = a_geometry(
        heads=4, kv_heads=2, head_dim_qk=32, head_dim_v=32, window=window, dtype=dtype,
        sequence_len=64, **extra,
    )  # fmt: skip
    assert _faults(geometry, [_flash("fa2", fault=fault)])


def test_a_whole_proof_passes_with_a_window_of_one_key_and_sinks() -> None:
    backend, function = _flash("fa2")
    geometry = replace(REFUSED[-1], head_dim_qk=64, head_dim_v=64, rows=2)
    silent: Callable[..., None] = lambda *_: None  # noqa: E731 - two arguments need it
    found = prove_geometry(
        function, backend, geometry, device="cpu", references={}, on_probe=silent, on_repeat=silent
    )
    assert found.reasons == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 2, 16])
def test_the_bounds_hold_and_are_a_small_share_of_the_terms(dtype: str, window: int) -> None:
    geometry = a_geometry(window=window, dtype=dtype, packing=True, sequence_len=64)
    case = next(case for case in list_cases(geometry, budget=CPU) if case.repeated)
    inputs = draw_inputs(case, device="cpu")
    exact = reference(case, inputs, dtype=torch.float64)
    kind = torch.finfo(inputs.q.dtype)
    unit, smallest = kind.eps / 2, 64 * kind.smallest_normal * kind.eps
    (row,) = each_row(case, inputs)
    bounds = rounding_bounds(row, unit=unit)
    for family in FAMILIES:
        backend, function = _flash(family)
        found = call(Probe(function, backend, case, inputs))
        for name in ("dq", "dk", "dv"):
            one, other = found.gradients[name], exact.gradients[name]
            assert one is not None
            assert other is not None
            # The result is rounded as well, in float16 to multiples of its smallest number.
            off = (one.double() - other).abs() - unit * other.abs() - smallest
            assert (off[0] <= bounds[name]).all(), (family, name)
    terms = inputs.d_out.abs().max() * inputs.v.abs().max() * inputs.k.abs().max()
    assert bounds["dq"].max() < 64 * unit * terms

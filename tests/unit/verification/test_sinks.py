"""The gradient of attention sinks: right in low precision passes, a wrong one does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_facts import a_backend, a_geometry
from torch import Tensor

from attnimg.backends._transformers import attention_function
from attnimg.facts import AttentionFunction, DType
from attnimg.verification.calls import Probe, call, draw_inputs
from attnimg.verification.cases import CPU, list_cases
from attnimg.verification.checks import build_expected, check_values
from attnimg.verification.reference import reference

EAGER = a_backend("eager")
# Heads, key heads, head size and tokens. The first was refused in bfloat16 although it is right.
SHAPES = [(8, 2, 64, 512), (4, 4, 32, 256), (2, 1, 16, 2048), (16, 2, 32, 129)]


class _Changed(torch.autograd.Function):
    """Leaves the sinks as they are, and changes their gradient."""

    @staticmethod
    def forward(ctx: Any, sinks: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return sinks.view_as(sinks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradient), None


def wrong(change: Callable[[Tensor], Tensor]) -> AttentionFunction:
    """Return eager attention with another gradient of the sinks."""
    eager = attention_function(EAGER, trusted=True)

    def attend(*args: Any, s_aux: Tensor, **kwargs: Any) -> Any:
        return eager(*args, s_aux=_Changed.apply(s_aux, change), **kwargs)

    return attend


def faults_of(
    function: AttentionFunction, shape: tuple[int, int, int, int], dtype: DType, *, packing: bool
) -> list[str]:
    """Return the rules that one call of each probe breaks, the whole rows left out."""
    heads, kv_heads, size, tokens = shape
    geometry = a_geometry(
        heads=heads, kv_heads=kv_heads, head_dim_qk=size, head_dim_v=size, sequence_len=tokens,
        dtype=dtype, packing=packing, dense=not packing, sinks=True,
    )  # fmt: skip
    found = []
    for case in list_cases(geometry, budget=CPU):
        if case.extra_gradients:
            continue
        inputs = draw_inputs(case, device="cpu")
        exact, plain = (
            reference(case, inputs, dtype=precision)
            for precision in (torch.float64, inputs.q.dtype)
        )
        probe = Probe(function, EAGER, case, inputs)
        found += check_values(probe, call(probe), build_expected(exact, plain))[1]
    return [fault.reason.text for fault in found]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_right_gradient_passes(shape: tuple[int, int, int, int], dtype: DType) -> None:
    right = attention_function(EAGER, trusted=True)
    assert faults_of(right, shape, dtype, packing=dtype != "float16") == []


@pytest.mark.parametrize(
    ("dtype", "packing"), [("bfloat16", True), ("bfloat16", False), ("float16", True)]
)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x * 1.05, id="5 % too large"),
        pytest.param(lambda x: x.roll(1), id="of another head"),
        pytest.param(torch.zeros_like, id="0"),
    ],
)
def test_a_wrong_gradient_is_refused(
    change: Callable[[Tensor], Tensor], dtype: DType, packing: bool
) -> None:
    found = faults_of(wrong(change), (4, 4, 32, 256), dtype, packing=packing)
    assert any("dsinks" in text for text in found)

"""Test that a captured call has the layer's results, and that capturing changes nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from attnimg.verification.running_check import Capture, CapturedCall, call_again

SDPA = AttentionInterface._global_mapping["sdpa"]
GET = AttentionInterface.get_interface


def layer(index: int) -> SimpleNamespace:
    return SimpleNamespace(layer_idx=index, is_causal=True)


def attend(module: Any, *tensors: Any, **arguments: Any) -> torch.Tensor:
    """Call attention as transformers' models do."""
    function = AttentionInterface().get_interface("sdpa", SDPA)
    out: torch.Tensor = function(module, *tensors, None, scaling=0.25, **arguments)[0]
    return out


def tensors() -> list[torch.Tensor]:
    return [torch.randn(2, heads, 7, 16, requires_grad=True) for heads in (4, 4, 4)]


def test_a_gradient_is_of_the_call_alone_where_layers_share_keys() -> None:
    q, k, v = tensors()
    found: list[CapturedCall] = []
    modules = [layer(3), layer(5)]
    with Capture(1, found.append).installed():
        out = attend(modules[0], q, k, v) + 2 * attend(modules[1], q + 1, k, v)
        out.sum().backward()
    (call,) = found
    assert call.layer == 5
    alone = [x.detach().clone().requires_grad_() for x in (q + 1, k, v)]
    (2 * attend(layer(5), *alone)).sum().backward()
    for name, leaf in zip(("dq", "dk", "dv"), alone, strict=True):
        assert torch.allclose(call.gradients[name], leaf.grad, atol=1e-6), name
    again = call_again(call)
    assert torch.equal(again.out, call.out)
    assert k.grad is not None
    assert not torch.allclose(call.gradients["dk"], k.grad)


@pytest.mark.parametrize("needs_grad", [(0,), (2,), (0, 2), (0, 1, 2), ()])
def test_inputs_without_requires_grad_get_no_gradient(needs_grad: tuple[int, ...]) -> None:
    given = tensors()
    for place, x in enumerate(given):
        x.requires_grad_(place in needs_grad)
    found: list[CapturedCall] = []
    with Capture(0, found.append).installed():
        out = attend(layer(0), *given)
        if needs_grad:
            out.sum().backward()
    (call,) = found
    names = tuple(("dq", "dk", "dv")[place] for place in needs_grad)
    assert (call.needs_grad, set(call.gradients)) == (names, set(names))
    assert (call.d_out is not None) == bool(needs_grad)


def test_a_call_without_gradients_waits_for_one_that_records_them() -> None:
    given, module = tensors(), layer(0)
    found: list[CapturedCall] = []
    capture = Capture(0, found.append)
    with capture.installed():
        with torch.no_grad():
            attend(module, *given)
        assert not found
        attend(module, *given).sum().backward()
        attend(module, *given).sum().backward()
    assert len(found) == 1
    assert len(capture.kinds) == 1


def test_a_tensor_that_the_model_overwrites_is_reported() -> None:
    found: list[CapturedCall] = []
    with Capture(0, found.append).installed():
        out = attend(layer(0), *tensors())
        out.mul_(2).sum().backward()
    assert [call.written for call in found] == [True]


def test_transformers_is_as_before_after_an_error() -> None:
    def fail() -> None:
        with Capture(0, lambda _: None).installed():
            assert AttentionInterface.get_interface is not GET
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert AttentionInterface.get_interface is GET

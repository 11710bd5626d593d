"""Kernels without a backward pass: gradients flow all the same, and are the exact ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from attention_cases import LAYER, draw, gradients, packed, plainly, same_document

from attnimg.backends import find_backend
from attnimg.backends._exact import with_exact_backward
from attnimg.backends._transformers import attention_function
from attnimg.errors import AttnimgError

STAND_IN = Path(__file__).parents[2] / "fixtures" / "sage_stand_in"


@pytest.fixture
def sageattention(monkeypatch):
    monkeypatch.syspath_prepend(str(STAND_IN))
    import sageattention

    yield sageattention
    sys.modules.pop("sageattention", None)


def sage(*tensors, **arguments):
    return attention_function(find_backend("sage"))(LAYER, *tensors, None, **arguments)[0]


def test_the_kernel_by_itself_cuts_the_gradient_off(sageattention):
    q, k, v = draw()
    assert not sageattention.sageattn(q, k, v, is_causal=True).requires_grad
    assert sage(q, k, v, scaling=0.4).requires_grad


@pytest.mark.parametrize("lengths", [[13], [1, 5, 7]], ids=["dense", "packed"])
def test_forward_is_the_kernels_and_backward_is_exact(sageattention, lengths):
    q, k, v = draw()
    arguments = packed(lengths) if len(lengths) > 1 else {}
    found = sage(q, k, v, scaling=0.4, **arguments)
    expected = plainly(q, k, v, seen=same_document(lengths), scale=0.4)
    assert 1e-5 < (found - expected).abs().max() < 0.15, "int8 rounds, and not by much"
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert other.abs().max() > 0.1
        assert (one - other).abs().max() < 1e-5


def test_a_document_is_rounded_by_its_own_keys_alone(sageattention):
    q, k, v = (x.detach() for x in draw())
    first = sage(q, k, v, scaling=0.4, **packed([6, 7]))
    k[:, :, :6] += 100
    assert torch.equal(sage(q, k, v, scaling=0.4, **packed([6, 7]))[:, 6:], first[:, 6:])


def test_taking_the_mean_off_the_keys_keeps_their_rounding_small(sageattention):
    q, k, v = (x.detach() for x in draw())
    arguments = {"scaling": 0.4} | packed([6, 7])
    shifted = sage(q, k + 50, v, **arguments)
    assert (shifted - sage(q, k, v, **arguments)).abs().max() < 0.05


def test_without_a_varlen_entry_documents_go_one_by_one(sageattention, monkeypatch):
    q, k, v = draw()
    expected = plainly(q, k, v, seen=same_document([4, 9]), scale=0.4)
    monkeypatch.delattr(sageattention, "sageattn_varlen")
    found = sage(q, k, v, scaling=0.4, **packed([4, 9]))
    assert (found - expected).abs().max() < 0.15


def test_queries_of_float32_norms_come_in_the_precision_of_the_run(sageattention):
    q, k, v = draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sage(q, k, v, scaling=0.4)
        found.float().sum().backward()
    assert found.dtype is torch.bfloat16
    assert all(x.grad.dtype is torch.float32 and x.grad.any() for x in (q, k, v))


def test_a_cache_is_refused(sageattention):
    with pytest.raises(AttnimgError, match="can't compute this batch"):
        sage(*draw(tokens=3, keys=8), scaling=0.4)


def test_gradient_checkpointing_gives_the_same_gradients(sageattention):
    from torch.utils.checkpoint import checkpoint

    leaves = draw()
    found = checkpoint(lambda *x: sage(*x, scaling=0.4), *leaves, use_reentrant=False)
    expected = gradients(sage(*leaves, scaling=0.4), leaves)
    assert all(torch.equal(a, b) for a, b in zip(gradients(found, leaves), expected, strict=True))


def test_any_forward_only_kernel_is_served():
    q, k, v = draw(heads=2)
    out = with_exact_backward(
        lambda q, k, v: torch.zeros_like(q), lambda q, k, v: q * k * v, q, k, v
    )
    assert not out.any()
    out.sum().backward()
    assert torch.allclose(q.grad, k * v)

"""torchao's fp8 attention, trained through: exact gradients, or a refusal."""

from __future__ import annotations

import pytest
import torch
from attention_cases import LAYER, draw, gradients, packed, plainly

from attnimg.backends.fp8 import fp8_attention, restore_flash_kernel
from attnimg.errors import AttnimgError


def fp8(*tensors, mask=None, **arguments):
    """Call attnimg's fp8 with a kernel that computes as torchao's does, in more digits."""

    def kernel(q, k, v, *, is_causal, scale):
        assert q.shape[1] == k.shape[1]
        assert not torch.is_grad_enabled()
        assert is_causal
        return plainly(q, k, v, scale=scale).transpose(1, 2).to(q.dtype)

    return fp8_attention(kernel)(LAYER, *tensors, mask, **arguments)[0]


@pytest.fixture
def fa3(monkeypatch):
    """Record the switching of torch's flash kernel, which needs a GPU."""
    log = []
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", log.append)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: log.append(None))
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: log[-1] if log else None)
    return log


def test_fp8_trains_by_exact_gradients(fa3):
    q, k, v = draw()
    found, expected = fp8(q, k, v, scaling=0.4), plainly(q, k, v, scale=0.4)
    assert (found - expected).abs().max() < 1e-5
    for one, other in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (one - other).abs().max() < 1e-4


def test_torchs_flash_kernel_is_switched_once_and_back_when_asked(fa3):
    restore_flash_kernel()
    assert fa3 == []
    for _ in range(3):
        fp8(*draw(), scaling=0.4)
    assert fa3 == ["FA3"]
    restore_flash_kernel()
    assert fa3 == ["FA3", None]


@pytest.mark.parametrize(
    ("mask", "arguments"),
    [
        pytest.param(None, packed([6, 7]), id="packed rows"),
        pytest.param(None, {"position_ids": torch.arange(13)[None] % 5}, id="by position"),
        pytest.param(torch.arange(13)[None] > 2, {}, id="padded rows"),
    ],
)
def test_fp8_refuses_what_its_kernel_has_no_mask_for(fa3, mask, arguments):
    with pytest.raises(AttnimgError) as caught:
        fp8(*draw(), mask=mask, scaling=0.4, **arguments)
    assert caught.value.code == "packing-not-isolated"
    assert fa3 == []

"""Compute exact attention with torch's kernels, also as the backward pass of forward-only kernels.

The letters of shapes are explained in _varlen.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._varlen import (
    AttentionCall,
    DenseKernel,
    as_attention_function,
    attention_by_document,
    repeat_kv,
)
from attnimg.facts import AttentionFunction


def exact_attention(backend: str) -> AttentionFunction:
    """Return exact attention, one document at a time; its mask is of the kind "flash"."""
    return as_attention_function(
        backend,
        ("window", "dropout"),
        lambda call: attention_by_document(call, exact_kernel(call)),
    )


def exact_kernel(call: AttentionCall) -> partial[Tensor]:
    """Return a function of q, k, v to (B, H, T, V), with a call's scale, mask and dropout."""
    return partial(
        exact,
        scale=call.scale,
        causal=call.causal,
        window=call.window,
        dropout=call.dropout,
    )


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention with torch's scaled_dot_product_attention.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, V).
        scale: factor on q @ k.
        causal: mask later keys, aligned at the bottom right: the last query attends to all keys.
        window: keys that a query attends to, its own included; None for all.
        dropout: dropout probability of the attention weights.

    Returns:
        (B, H, T, V).
    """
    k, v = repeat_kv(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, which is equal if there are as many queries as keys.
    plain = causal and window is None and queries == keys
    mask = None
    # A single query is aligned with the last key and attends to all keys.
    if not plain and (window is not None or (causal and queries > 1)):
        ahead = (
            torch.arange(keys, device=q.device) - torch.arange(queries, device=q.device)[:, None]
        )
        ahead -= keys - queries
        mask = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
        if window is not None:
            mask = mask & (ahead > -window) & (ahead < window)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scale
    )


class _ExactBackward(torch.autograd.Function):  # type: ignore[misc]  # torch's types are not followed
    """Run one function forward; compute the gradients of another from the saved q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, kernel: DenseKernel, exact: DenseKernel, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        ctx.exact = exact
        ctx.save_for_backward(q, k, v)
        return kernel(q, k, v)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]  # as above
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        device = gradient.device.type
        # q, k and v are cast already; autocast would cast them a second time.
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            out = ctx.exact(*leaves)
        return None, None, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))


def with_exact_backward(
    kernel: DenseKernel, exact: DenseKernel, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Run a forward-only kernel, with the gradients of exact attention for q, k and v.

    The output of such a kernel is not connected to the autograd graph. Without this function the
    loss would still fall, because the other weights are trained, but the projections of q, k and v
    would get no gradient.
    Source: https://github.com/thu-ml/SageAttention/issues/198 (2026-11-21).

    Args:
        kernel: q, k, v to the output; it runs without autograd.
        exact: the same function, differentiable.
        q: queries, in the layout of both functions.
        k: keys.
        v: values.

    Returns:
        The kernel's output.
    """
    out: Tensor = _ExactBackward.apply(kernel, exact, q, k, v)
    return out

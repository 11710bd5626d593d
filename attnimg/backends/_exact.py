"""Exact attention on torch's own kernels, and gradients of it for kernels without a backward pass.

Letters: see _varlen.py.
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
    ungrouped,
)
from attnimg.facts import AttentionFunction


def exact_attention(backend: str) -> AttentionFunction:
    """Return attention on torch's kernels, document by document; its mask is that of "flash"."""
    return as_attention_function(
        backend,
        ("window", "dropout"),
        lambda call: attention_by_document(call, exact_kernel(call)),
    )


def exact_kernel(call: AttentionCall) -> partial[Tensor]:
    """Return exact attention with a call's scale, mask and dropout: q, k, v to (B, H, T, V)."""
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
    """Compute attention within each batch element, by torch's scaled_dot_product_attention.

    Args:
        q: (B, H, T, D).
        k: (B, G, S, D).
        v: (B, G, S, V).
        scale: factor on q @ k.
        causal: hide keys to the right of the query, which stands at the bottom right.
        window: keys a query sees; None for all.
        dropout: share of the weights to drop.

    Returns:
        (B, H, T, V).
    """
    k, v = ungrouped(q, k, v)
    queries, keys = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, which is the same for as many queries as keys.
    plain = causal and window is None and queries == keys
    mask = None
    # One query stands at the last key, and sees all.
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
    """Forward by one function, backward by another, recomputed from the saved q, k and v."""

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
        # q, k and v have their precision already; autocast would change it a second time.
        with torch.enable_grad(), torch.autocast(device, enabled=False):
            out = ctx.exact(*leaves)
        return None, None, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))


def with_exact_backward(
    kernel: DenseKernel, exact: DenseKernel, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Run a forward-only kernel so that gradients reach q, k and v.

    Without this, such a kernel returns tensors that autograd knows nothing of: the loss still
    falls, by the other weights, while q, k and v never learn.
    Source: https://github.com/thu-ml/SageAttention/issues/198 (2026-11-21).

    Args:
        kernel: q, k, v to the output; autograd is off inside.
        exact: the same function, differentiable.
        q: queries, in the layout that both take.
        k: keys.
        v: values.

    Returns:
        The kernel's output.
    """
    out: Tensor = _ExactBackward.apply(kernel, exact, q, k, v)
    return out

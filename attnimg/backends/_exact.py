"""Exact attention on torch's own kernels, one document at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._arguments import Call, read_call
from attnimg.backends._documents import attend_by_document


def attend_exactly(call: Call) -> Tensor:
    """Attend with scaled_dot_product_attention, each document by itself; gives (B, T, H, V)."""
    return attend_by_document(call, exact_kernel(call))


def exact_attention(
    backend: str,
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    **arguments: Any,
) -> tuple[Any, None]:
    """Attend on torch's kernels, document by document; attention_mask is that of "flash"."""
    honours = frozenset({"window", "dropout"})
    call = read_call(
        backend, module, query, key, value, attention_mask, honours=honours, **arguments
    )
    return attend_exactly(call), None


def exact_kernel(call: Call) -> partial[Tensor]:
    """Give exact attention with a call's scale, mask and dropout: q, k, v to (B, H, T, V)."""
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
    """Attend within each batch element, by torch's scaled_dot_product_attention.

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
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    queries, keys = q.shape[2], k.shape[2]
    # torch aligns is_causal at the top left, which is the same for as many queries as keys.
    plain = causal and window is None and queries == keys
    mask = None if plain else visible(queries, keys, causal=causal, window=window, device=q.device)
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=plain, scale=scale
    )


def visible(
    queries: int, keys: int, *, causal: bool, window: int | None, device: torch.device
) -> Tensor | None:
    """Tell which keys each query sees, bool (T, S); None for all of them."""
    # One query stands at the last key, and sees all.
    if window is None and (not causal or queries == 1):
        return None
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
    ahead -= keys - queries
    seen = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        seen = seen & (ahead > -window) & (ahead < window)
    return seen

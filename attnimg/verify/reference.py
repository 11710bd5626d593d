"""Plain attention in any precision, written out: what every backend is compared with.

No fused kernel and none of torch's attention functions takes part, so that a fault in those cannot
hide in the reference too.
Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
E head size of v.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visible: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Attend step by step in the precision of the inputs.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, G, S, D), H a multiple of G.
        v: values, (B, G, S, E).
        visible: where a query may look, bool, (B, 1, T, S).
        scale: factor on q @ k.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a logit for each head that joins the softmax and has no value, (H,).
        keep: factors on the attention weights, such as those of dropout, (B, H, T, S).

    Returns:
        (B, T, H, E). A query that sees no key gets zeros.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.matmul(q, k.transpose(-1, -2)) * scale
    weights = attention_weights(scores, visible=visible, softcap=softcap, sinks=sinks)
    if keep is not None:
        weights = weights * keep
    return torch.matmul(weights, v).transpose(1, 2)


def attention_weights(
    scores: Tensor, *, visible: Tensor, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Return the softmax of scaled scores, (B, H, T, S); the other arguments are attend's."""
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    # Detached: subtracting any constant leaves a softmax and its gradient as they are.
    highest = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        highest = torch.maximum(highest, sinks.detach()[None, :, None, None])
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    weights = torch.exp(scores - highest)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[None, :, None, None] - highest)
    return weights / total.masked_fill(total == 0, 1.0)


def visible_keys(documents: Tensor, *, places: Tensor, window: int | None) -> Tensor:
    """Tell which keys each query sees: those of its document, not later ones, within its window.

    Args:
        documents: which document each key belongs to, int, (B, S); below 0 for padding.
        places: among the keys, where each query stands, int, (T,). The last query of a call
            stands at the last key (bottom-right).
        window: keys that a query sees, its own included; None for all.

    Returns:
        Bool, (B, 1, T, S).
    """
    place_S = torch.arange(documents.shape[1], device=documents.device)
    behind_TS = places[:, None] - place_S[None, :]
    seen_TS = behind_TS >= 0
    if window is not None:
        seen_TS &= behind_TS < window
    of_query = documents[:, places, None]
    same_BTS = (of_query == documents[:, None, :]) & (of_query >= 0)
    return (seen_TS & same_BTS)[:, None]

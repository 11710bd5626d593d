"""Call torch.nn.attention.varlen.varlen_attn. Letters: see documents.py."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnimg.backends._arguments import read_call
from attnimg.backends._documents import Documents, attend_by_document


def attend_varlen(
    varlen: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    *,
    honours: frozenset[str],
    **arguments: Any,
) -> Tensor:
    """Attend within documents; gives (B, T, H, V).

    Args:
        varlen: torch's varlen_attn.
        module: the model's attention layer.
        query: (B, H, T, D), and so on: see attnimg.backends._attend.
        key: (B, G, S, D).
        value: (B, G, S, D).
        mask: None, or True where a token is none of the padding, (B, S).
        honours: which features of arguments.py it can do.
        arguments: what else the model passes.
    """
    call = read_call("varlen_attn", module, query, key, value, mask, honours=honours, **arguments)
    left = -1 if call.window is None else call.window - 1
    options: dict[str, Any] = {
        "scale": call.scale,
        "window_size": (left, 0) if call.causal else (left, left),
    }
    grouped = query.shape[1] != key.shape[1]
    # torch 2.11 has no such argument, and takes as many key heads as query heads.
    knows_groups = "enable_gqa" in inspect.signature(varlen).parameters
    if grouped and knows_groups:
        options["enable_gqa"] = True

    def packed(documents: Documents) -> Tensor:
        k, v = documents.k, documents.v
        if grouped and not knows_groups:
            group = query.shape[1] // key.shape[1]
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        out: Tensor = varlen(
            documents.q,
            k,
            v,
            documents.bounds_q,
            documents.bounds_k,
            documents.longest_q,
            documents.longest_k,
            **options,
        )
        return out

    return attend_by_document(call, None, packed)

"""Define torch's varlen_attn: a varlen kernel that needs no package besides torch.

It is torch's build of FlashAttention-2, with the limits of sdpa's flash kernel and without dropout.
Source: torch 2.13, torch/nn/attention/varlen.py (2026-11-21).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall, PackedTokens

_FEATURES = frozenset({"window"})


def load_varlen_attn() -> AttentionFunction:
    """Return an attention function that calls the installed torch's varlen_attn.

    Raises:
        AttnimgError: this torch has none, or it does not load.
    """
    from attnimg.backends._loading import import_kernel

    module = import_kernel("torch.nn.attention.varlen", backend="varlen_attn", package="torch")
    return varlen_attention(module.varlen_attn)


def varlen_attention(varlen: Callable[..., Any]) -> AttentionFunction:
    """Return an attention function that calls a function like torch's varlen_attn."""
    from attnimg.backends._varlen import as_attention_function, attention_by_document, repeat_kv

    # torch 2.11 has no such argument, and needs as many key heads as query heads.
    knows_groups = "enable_gqa" in inspect.signature(varlen).parameters

    def compute(call: AttentionCall) -> Tensor:
        left = -1 if call.window is None else call.window - 1
        grouped = call.q.shape[1] != call.k.shape[1]
        options: dict[str, Any] = {"enable_gqa": True} if grouped and knows_groups else {}

        def packed(tokens: PackedTokens) -> Tensor:
            k, v = tokens.k, tokens.v
            if not knows_groups:
                k, v = repeat_kv(tokens.q, k, v)
            out: Tensor = varlen(
                tokens.q,
                k,
                v,
                *tokens.boundaries,
                scale=call.scale,
                window_size=(left, 0) if call.causal else (left, left),
                **options,
            )
            return out

        return attention_by_document(call, None, packed)

    return as_attention_function("varlen_attn", _FEATURES, compute)


BACKEND = Backend(
    name="varlen_attn",
    rank=45,
    rank_why="is torch's FlashAttention-2, an older version than flash-attn's",
    rank_source="torch 2.13, torch/nn/attention/varlen.py (2026-11-26)",
    summary="PyTorch's varlen_attn",
    packing="native",
    in_config=False,
    applied_as="attnimg_varlen_attn",
    load_function=load_varlen_attn,
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capability_min=(8, 0),
        arch_code="arch-too-old",
        arch_text="sm_80 or newer",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), equal=True, multiple=8),),
        features=_FEATURES,
        backward=frozenset({"nvidia"}),
        torch_min=("2.10", "version-low"),
        packed_only=True,
    ),
)

"""Define SageAttention 2: int8 q and k in the forward pass; gradients of exact attention.

It is an approximation, so `auto` never chooses it. Source: SageAttention d1a57a5,
sageattention/core.py lines 143-157 (the GPUs it dispatches to) and its head_dim checks. Read
2026-11-21.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall, PackedTokens

# The names of its functions.
DENSE, VARLEN = "sageattn", "sageattn_varlen"


def _load() -> AttentionFunction:
    from attnimg.backends._loading import import_kernel

    package = import_kernel("sageattention", backend="sage", package="sageattention")
    varlen = getattr(package, VARLEN, None)
    return sage_attention("sage", dense=getattr(package, DENSE), varlen=varlen)


def sage_attention(
    backend: str, *, dense: Callable[..., Any], varlen: Callable[..., Any] | None
) -> AttentionFunction:
    """Return an attention function that calls SageAttention's entry points.

    Args:
        backend: the backend's name, for errors.
        dense: sageattn, or one of its variants with the same arguments.
        varlen: sageattn_varlen; without it, `dense` computes one document at a time.
    """
    from attnimg.backends._exact import exact_kernel, with_exact_backward
    from attnimg.backends._loading import kernel_error
    from attnimg.backends._varlen import (
        as_attention_function,
        attend_each_document,
        attention_by_document,
    )

    def compute(call: AttentionCall) -> Tensor:
        call = _cast_to_autocast_dtype(call)
        packed = partial(compute_packed, call) if varlen else None
        return attention_by_document(call, partial(compute_dense, call), packed)

    def compute_dense(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        causal = call.causal and q.shape[2] > 1
        if causal and q.shape[2] != k.shape[2]:
            raise kernel_error(
                f"{backend} can't compute this batch",
                why=f"found {q.shape[2]} queries on {k.shape[2]} keys; causal needs equal numbers",
                code="argument-not-honoured",
            )
        kernel = partial(dense, tensor_layout="HND", is_causal=causal, sm_scale=call.scale)
        return with_exact_backward(kernel, exact_kernel(call), q, k, v)

    def compute_packed(call: AttentionCall, tokens: PackedTokens) -> Tensor:
        assert varlen is not None

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = varlen(
                q,
                _subtract_document_means(k, tokens.cu_seqlens_k),
                v,
                *tokens.boundaries,
                is_causal=call.causal,
                sm_scale=call.scale,
                # True would subtract the mean over all documents: they would affect one another.
                smooth_k=False,
            )
            return found

        def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_each_document(replace(tokens, q=q, k=k, v=v), exact_kernel(call))

        return with_exact_backward(kernel, exact, tokens.q, tokens.k, tokens.v)

    return as_attention_function(backend, (), compute)


def _subtract_document_means(k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the keys, (M, G, D), minus the mean over their document.

    This leaves the softmax unchanged and reduces the quantization error of int8. Source:
    SageAttention2, arXiv 2411.10958, section 3.1.
    """
    import torch

    lengths = cu_seqlens.diff()
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=k.device), lengths, output_size=len(k)
    )
    sums = k.new_zeros(len(lengths), *k.shape[1:], dtype=torch.float32)
    means = sums.index_add(0, document, k.float()) / lengths.clamp(min=1)[:, None, None]
    return (k.float() - means[document]).to(k.dtype)


def _cast_to_autocast_dtype(call: AttentionCall) -> AttentionCall:
    """Cast q, k and v to autocast's dtype: q may be float32, after PEFT's float32 norms."""
    import torch

    device = call.q.device.type
    if call.q.dtype is not torch.float32 or not torch.is_autocast_enabled(device):
        return call
    dtype = torch.get_autocast_dtype(device)
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


BACKEND = Backend(
    name="sage",
    rank=70,
    rank_why="is an approximation",
    rank_source="SageAttention, README (2026-11-21)",
    summary="SageAttention (int8 QK)",
    packing="native",
    automatic=False,
    applied_as="attnimg_sage",
    load_function=_load,
    k_forward=None,
    sqnr_db=20.0,
    tolerance_source="ours: SageAttention's repository has no accuracy test (2026-11-21)",
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)}),
        arch_code="sage-arch",
        arch_text="sm_80, sm_86, sm_89, sm_90, sm_120 or sm_121",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 128), v=(1, 128), equal=True),),
        features=frozenset(),
        packages=(("sageattention", "2.2.0", "not-installed"),),
    ),
)

"""Call FlashAttention-4 as a training run does: with tensors that have a shape and no data.

Under torch's fake tensors it compiles what the call needs and launches nothing. The backward pass
is called directly: through autograd, torch asks for a GPU that isn't here.
Letters: B batch, T tokens, H query heads, G key/value heads, D head size of q and k, V of v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flash_attn.cute import interface
from precompiled.fa4.kernel_set import Call

# Long enough to avoid the kernels for short sequences, and few enough documents to avoid those for
# many. Otherwise a kernel's key does not depend on them, nor on the length of a window, only on
# whether there is one. Source: compile_key in interface.py of flash-attn-4 4.0.0b36 (2026-11-26).
BATCH, TOKENS, KV_HEADS, WINDOW = 2, 4096, 4, 1024


def attend(
    call: Call,
    *,
    empty: Callable[..., torch.Tensor],
    batch: int = BATCH,
    tokens: int = TOKENS,
    kv_heads: int = KV_HEADS,
) -> None:
    """Make one call, with a backward pass if it has a gradient.

    Args:
        call: the kernel's.
        empty: creates a tensor: empty(*shape, dtype=..., requires_grad=...).
        batch: B; the number of documents if the call is varlen.
        tokens: T of each.
        kv_heads: G.
    """
    dtype = getattr(torch, call.dtype)
    rows = (batch * tokens,) if call.varlen else (batch, tokens)
    heads = call.heads_per_kv * kv_heads
    options: dict[str, Any] = {"causal": True, "softcap": call.softcap}
    if call.window:
        options |= {"window_size_left": WINDOW - 1, "window_size_right": WINDOW - 1}
    if call.sinks:
        options["learnable_sink"] = empty(heads, dtype=dtype, requires_grad=False)
    if call.varlen:
        ends = empty(batch + 1, dtype=torch.int32, requires_grad=False)
        options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
        options |= {"max_seqlen_q": tokens, "max_seqlen_k": tokens}
    q, k, v = (
        empty(*rows, count, size, dtype=dtype, requires_grad=call.gradient)
        for count, size in (
            (heads, call.head_dim),
            (kv_heads, call.head_dim),
            (kv_heads, call.head_dim_v),
        )
    )
    out, lse, *_ = interface._flash_attn_fwd(q, k, v, **options)
    if call.gradient:
        q, k, v = (tensor.detach() for tensor in (q, k, v))
        out, dout, lse = (
            empty(*like.shape, dtype=like.dtype, requires_grad=False) for like in (out, out, lse)
        )
        interface._flash_attn_bwd(q, k, v, out, dout, lse, **options)

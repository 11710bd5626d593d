"""Call xFormers' memory_efficient_attention with the mask object that a call needs.

Source: xformers 0.0.35, ops/fmha/{__init__,attn_bias,cutlass,flash}.py (read 2026-11-21).
Letters: see documents.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnimg.backends._arguments import Call, read_call
from attnimg.backends._documents import Documents, attend_by_document
from attnimg.errors import AttnimgError

_FEATURES = frozenset({"window", "dropout"})


def attend_xformers(
    ops: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks.

    Args:
        ops: the module xformers.ops.
        module: the model's attention layer.
        query: (B, H, T, D), and so on: see attnimg.backends._attend.
        key: (B, G, S, D).
        value: (B, G, S, V).
        mask: None, or True where a token is none of the padding, (B, S).
        arguments: what else the model passes.
    """
    call = read_call("xformers", module, query, key, value, mask, honours=_FEATURES, **arguments)

    def packed(documents: Documents) -> Tensor:
        bias = _bias(ops, call, documents)
        out = _call(ops, call, documents.q, documents.k, documents.v, bias)
        return out[0]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = None
        if call.causal and q.shape[2] == k.shape[2]:
            bias = ops.LowerTriangularMask()
        elif call.causal:
            bias = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
        q_BTHD, k_BSGD, v_BSGV = (x.transpose(1, 2) for x in (q, k, v))
        return _call(ops, call, q_BTHD, k_BSGD, v_BSGV, bias).transpose(1, 2)

    # Windows exist for documents in a row; cutlass has no backward pass for the dense form.
    return attend_by_document(call, dense if call.window is None else None, packed), None


def _call(ops: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Any) -> Tensor:
    """Attend with q (B, T, H, D) or (N, H, D); gives (B, T, H, V)."""
    group = q.shape[-2] // k.shape[-2]
    if group > 1:
        # cutlass's backward pass takes no groups of heads.
        k, v = (x.repeat_interleave(group, dim=-2) for x in (k, v))
    q, k, v = (x[None] if x.dim() == 3 else x for x in (q, k, v))
    out: Tensor = ops.memory_efficient_attention(
        q, k, v, attn_bias=bias, p=call.dropout, scale=call.scale
    )
    return out


def _bias(ops: Any, call: Call, documents: Documents) -> Any:
    """Give the mask that keeps documents apart."""
    kinds = ops.fmha.attn_bias
    lengths_q, lengths_k = (x.diff().tolist() for x in (documents.bounds_q, documents.bounds_k))
    if not call.causal:
        if call.window is not None:
            raise _refusal("a window to both sides")
        return kinds.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    if lengths_q == lengths_k:
        bias = kinds.BlockDiagonalCausalMask.from_seqlens(lengths_q)
        # Backward, cutlass knows this window alone: the one aligned at the top left.
        return bias if call.window is None else bias.make_local_attention(call.window)
    if call.window is not None:
        raise _refusal("a window with fewer queries than keys")
    return kinds.BlockDiagonalCausalFromBottomRightMask.from_seqlens(lengths_q, lengths_k)


def _refusal(found: str) -> AttnimgError:
    return AttnimgError(
        "xformers has no mask for this batch",
        why=f"found {found}, which its kernels do not take",
        do="set attn_implementation: sdpa",
        code="argument-not-honoured",
        key="attn_implementation",
        exit_code=1,
    )

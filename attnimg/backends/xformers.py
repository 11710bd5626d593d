"""Define xFormers' memory-efficient attention: the varlen kernel for GPUs older than Ampere.

Source: xformers 0.0.35, ops/fmha/{__init__,attn_bias,common,cutlass,flash}.py. Read 2026-11-21.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall, PackedTokens

_BLACKWELL = frozenset({10, 11, 12})
_FEATURES = frozenset({"window", "dropout"})


def _load() -> AttentionFunction:
    from attnimg.backends._loading import import_kernel

    return xformers_attention(import_kernel("xformers.ops", backend="xformers", package="xformers"))


def xformers_attention(ops: Any) -> AttentionFunction:
    """Return an attention function that calls xformers.ops with the mask object of each call."""
    from attnimg.backends._varlen import as_attention_function, attention_by_document, repeat_kv

    def compute(call: AttentionCall) -> Tensor:
        def kernel(q_BTHD: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            # The backward pass of CUTLASS has no grouped-query attention.
            k, v = repeat_kv(q_BTHD, k, v, dim=2)
            out: Tensor = ops.memory_efficient_attention(
                q_BTHD, k, v, attn_bias=mask, p=call.dropout, scale=call.scale
            )
            return out

        def packed(tokens: PackedTokens) -> Tensor:
            mask = _document_mask(ops.fmha.attn_bias, call, tokens)
            return kernel(tokens.q[None], tokens.k[None], tokens.v[None], mask)[0]

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = None
            if call.causal and q.shape[2] == k.shape[2]:
                mask = ops.LowerTriangularMask()
            elif call.causal:
                mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask()
            q_BTHD, k_BSGD, v_BSGV = (x.transpose(1, 2) for x in (q, k, v))
            return kernel(q_BTHD, k_BSGD, v_BSGV, mask).transpose(1, 2)

        # With a window, CUTLASS has a backward pass for packed documents, but not for dense rows.
        return attention_by_document(call, dense if call.window is None else None, packed)

    return as_attention_function("xformers", _FEATURES, compute)


def _document_mask(kinds: Any, call: AttentionCall, tokens: PackedTokens) -> Any:
    from attnimg.backends._loading import kernel_error

    lengths_q, lengths_k = (x.diff().tolist() for x in (tokens.cu_seqlens_q, tokens.cu_seqlens_k))
    equal = lengths_q == lengths_k
    if call.window is not None and not (call.causal and equal):
        found = "a window with fewer queries than keys" if call.causal else "a window to both sides"
        raise kernel_error(
            "xformers has no mask for this batch",
            why=f"found {found}, which its kernels do not support",
            code="argument-not-honoured",
        )
    if not call.causal:
        return kinds.BlockDiagonalMask.from_seqlens(lengths_q, lengths_k)
    if not equal:
        return kinds.BlockDiagonalCausalFromBottomRightMask.from_seqlens(lengths_q, lengths_k)
    mask = kinds.BlockDiagonalCausalMask.from_seqlens(lengths_q)
    # The backward pass of CUTLASS supports only this window, which is aligned at the top left.
    return mask if call.window is None else mask.make_local_attention(call.window)


BACKEND = Backend(
    name="xformers",
    rank=54,
    rank_why="is not timed here, and has few kernels that torch does not have",
    rank_source="xformers 0.0.35, ops/fmha/dispatch.py (2026-11-26)",
    ranks=(
        Rank(
            rank=47,
            archs=frozenset({"sm_70", "sm_75"}),
            packed=True,
            why="is the only kernel below sm_80 that accepts document boundaries in one call",
            source="xformers 0.0.35, ops/fmha/attn_bias.py, BlockDiagonalMask, and cutlass.py "
            "(2026-11-26)",
        ),
    ),
    summary="xFormers memory-efficient attention",
    packing="native",
    applied_as="attnimg_xformers",
    load_function=_load,
    needs=Needs(
        vendors=frozenset({"nvidia", "amd"}),
        capability_min=(7, 0),
        gfx=frozenset({"gfx90a", "gfx942"}),
        arch_code="arch-too-old",
        arch_text="sm_70 or newer, gfx90a or gfx942",
        # On Blackwell xFormers has only FlashAttention-2's kernels, in half precision; CUTLASS's
        # end at sm_90. In half precision CUTLASS needs multiples of 8, for tensor cores.
        head_dims=(
            HeadDims(majors=frozenset({7, 8, 9}), multiple=8, multiple_v=8),
            HeadDims(majors=_BLACKWELL, qk=(1, 256), v=(1, 256), multiple=8, equal=True),
        ),
        dtypes_missing=dict.fromkeys(_BLACKWELL, frozenset({"float32"})),
        features=_FEATURES,
        backward=frozenset({"nvidia", "amd"}),
        packages=(("xformers", "0.0.33", "not-installed"),),
    ),
)

"""torch's own varlen_attn: the packing kernel that needs no package.

FlashAttention-2 as torch builds it in, so its limits are those of sdpa's flash kernel; no dropout.
Source: torch 2.13, torch/nn/attention/varlen.py (2026-11-21).
"""

from typing import Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs

_FEATURES = frozenset({"window"})


def _load() -> AttentionFunction:
    from attnimg.backends._imports import import_kernel

    kernel = import_kernel("torch.nn.attention.varlen", backend="varlen_attn", package="torch")
    from attnimg.backends._torch_varlen import attend_varlen

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **arguments: Any
    ) -> tuple[Any, None]:
        return attend_varlen(
            kernel.varlen_attn,
            module,
            query,
            key,
            value,
            attention_mask,
            honours=_FEATURES,
            **arguments,
        ), None

    return attend


BACKEND = Backend(
    name="varlen_attn",
    rank=45,
    rank_why="is torch's FlashAttention-2, an older one than flash-attn's own",
    rank_source="torch 2.13, torch/nn/attention/varlen.py (2026-11-26)",
    summary="PyTorch's varlen_attn",
    packing="native",
    in_config=False,
    applied_as="attnimg_varlen_attn",
    load_attend=_load,
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

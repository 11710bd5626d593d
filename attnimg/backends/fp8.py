"""torchao's fp8 attention: Hopper alone, on FlashAttention-3, and without a backward pass.

It also strips masks, so packed or padded batches would be wrong. Source: torchao 0.18.0,
prototype/attention/__init__.py ("backward is not supported"), api.py, utils.py. Read 2026-11-21.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs


def _load() -> AttentionFunction:
    from attnimg.backends._imports import import_kernel

    name = "torchao.prototype.attention.fp8_fa3.attention"
    kernel = import_kernel(name, backend="fp8", package="torchao").fp8_fa3_sdpa
    from attnimg.backends._fp8 import attend_fp8

    return partial(attend_fp8, kernel)


BACKEND = Backend(
    name="fp8",
    rank=75,
    rank_why="approximates",
    rank_source="torchao 0.18.0, prototype/attention (2026-11-21)",
    summary="torchao fp8 attention",
    packing="none",
    automatic=False,
    forward_only=True,
    applied_as="attnimg_fp8",
    load_attend=_load,
    k_forward=None,
    sqnr_db=25.0,
    tolerance_source="pytorch/ao, test_fp8_attention.py: SQNR above 25 dB (2026-11-21)",
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(9, 0)}),
        arch_code="fp8-arch",
        arch_text="sm_90 (Hopper): all that torchao 0.18 serves",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), equal=True),),
        features=frozenset(),
        backward=frozenset(),
        backward_code="fp8-no-backward",
        packages=(
            ("torchao", "0.17", "fp8-torchao"),
            ("flash-attn-3", "3.0.0", "fp8-needs-fa3"),
        ),
        torch_min=("2.11", "fp8-torch"),
    ),
)

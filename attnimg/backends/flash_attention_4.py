"""Define FlashAttention-4, the package flash-attn-4 (CuTe DSL): Hopper and Blackwell.

The head sizes are those whose forward and backward kernels compiled for each target, without a GPU,
and fit into its shared memory. transformers pads v to the head_dim of q and k: MLA's (192, 128)
would become (192, 192), which the Blackwell kernels do not support. Source:
flash-attn-4 4.0.0b36, flash_attn/cute/interface.py, compiled 2026-11-21.

The second backend is the same package with its generic backward pass, for head_dim 256 with a
window on B200 and B300. The special backward pass for head_dim 256 supports neither a window
(sm100_hd256_2cta_fmha_backward.py:60) nor a soft cap (interface.py:2958).
FLASH_ATTENTION_HD256_GENERIC_BWD=1 selects flash_bwd_sm100.py for head_dim 256 instead, which
supports both. The variable is read at each backward call (interface.py:2387 and 2441,
utils.py:103), so it can't be set for one layer: it affects all layers of this head size.
No timing of this kernel is published. flash-attention PR #2749, another patch for the same case,
has one: backward on a B300 13.98 ms with FlashAttention-2, 4.04 ms with FlashAttention-4. Source:
flash-attn-4 4.0.0b36, and compiled for sm_100 and sm_103, forward and backward, packed, with a
window and a soft cap (2026-11-26).
"""

from __future__ import annotations

import os

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

_HOPPER, _DATACENTER_BLACKWELL = frozenset({9}), frozenset({10, 11})
_RTX_BLACKWELL = frozenset({12})
_GENERIC = {"FLASH_ATTENTION_HD256_GENERIC_BWD": "1"}

_FLASH_4 = Backend(
    name="flash_attention_4",
    rank=10,
    rank_why="is written for this generation of GPUs",
    rank_source="README of flash-attn-4 4.0.0b36: optimized for Hopper and Blackwell (2026-11-26)",
    ranks=(
        Rank(
            rank=61,
            compiled=True,
            why="registers no custom op, so that torch.compile breaks the graph at each call",
            source="flash-attn-4 4.0.0b36: no torch.library in its Python; flash-attention PR "
            "#2164, open, adds one; vllm-omni PR #7220: dynamic shapes fail without (2026-11-26)",
        ),
        Rank(
            rank=25,
            archs=frozenset({"sm_90"}),
            why="is not faster than FlashAttention-3 on Hopper",
            source="flash-attention PR #2889: backward at head_dim 256 on an H200, 373 against "
            "480 TFLOP/s; torchtitan PR #4413: similar for packed rows on a GH200 (2026-11-26)",
        ),
        Rank(
            rank=36,
            archs=frozenset({"sm_120", "sm_121"}),
            why="trains slower than FlashAttention-2 on these GPUs",
            source="flash-attention #1981: backward at head_dim 128 on an RTX 5070 Ti, main of "
            "2026-08-05, 26 to 27 % slower than flash-attn 2.8.3 (2026-11-26)",
        ),
    ),
    summary="FlashAttention-4",
    packing="native",
    applied_as="flash_attention_4",
    module="flash_attn.cute",
    hub_repo="kernels-community/flash-attn4",
    family="flash",
    unpadded_v=True,
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capability_min=(9, 0),
        capability_max=(12, 1),
        arch_code="arch-too-old",
        arch_text="sm_90 to sm_121 (Hopper, Blackwell)",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(
            HeadDims(majors=_HOPPER, qk=(8, 256), v=(8, 256), multiple=8),
            HeadDims(majors=_DATACENTER_BLACKWELL, qk=(8, 128), v=(8, 128), multiple=8),
            HeadDims(
                majors=_DATACENTER_BLACKWELL,
                qk=(256, 256),
                v=(256, 256),
                equal=True,
                without=frozenset({"window", "softcap", "sinks"}),
            ),
            # MLA's sizes: attnimg's direct call passes v unpadded, transformers does not.
            HeadDims(majors=_DATACENTER_BLACKWELL, qk=(192, 192), v=(128, 128), ungrouped=True),
            # The backward pass of head_dim 192 needs 115,712 bytes of shared memory; these GPUs
            # have 101,376.
            HeadDims(majors=_RTX_BLACKWELL, qk=(8, 160), v=(8, 160), multiple=8),
        ),
        features=frozenset({"window", "softcap", "sinks"}),
        features_missing={12: frozenset({"sinks"})},
        backward=frozenset({"nvidia"}),
        packages=(("flash-attn-4", None, "not-installed"),),
    ),
)


def _load_generic() -> AttentionFunction:
    os.environ.update(_GENERIC)
    from attnimg.backends._transformers import flash_kernel

    return flash_kernel(_FLASH_4, trusted=False)


BACKENDS = (
    _FLASH_4,
    Backend(
        name="flash_attention_4_generic",
        rank=15,
        rank_why="has a backward pass for head_dim 256 with a window, where FlashAttention-4 has "
        "none",
        rank_source="flash-attention PR #2749: backward on a B300, 4.04 ms against 13.98 ms of "
        "FlashAttention-2, with a patched kernel (2026-11-26)",
        ranks=(
            Rank(
                rank=63,
                compiled=True,
                why="registers no custom op, so that torch.compile breaks the graph at each call",
                source="flash-attn-4 4.0.0b36: no torch.library in its Python (2026-11-26)",
            ),
        ),
        summary="FlashAttention-4, generic backward pass",
        packing="native",
        in_config=False,
        applied_as="attnimg_fa4_generic",
        load_function=_load_generic,
        for_process=_GENERIC,
        needs=Needs(
            vendors=frozenset({"nvidia"}),
            capabilities=frozenset({(10, 0), (10, 3)}),
            arch_text="sm_100 or sm_103 (B200, B300)",
            dtypes=_FLASH_4.needs.dtypes,
            head_dims=(HeadDims(qk=(256, 256), v=(256, 256), equal=True),),
            features=frozenset({"window", "softcap"}),
            backward=frozenset({"nvidia"}),
            packages=_FLASH_4.needs.packages,
        ),
    ),
)

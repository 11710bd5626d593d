"""FlashAttention-4 with its generic backward pass: head_dim 256 with a window on B200 and B300.

Its own backward pass for head_dim 256 takes no window (sm100_hd256_2cta_fmha_backward.py:60) and no
soft cap (interface.py:2958). FLASH_ATTENTION_HD256_GENERIC_BWD=1 sends head_dim 256 to
flash_bwd_sm100.py instead, which takes both. The variable is read at each backward call
(interface.py:2387 and 2441, utils.py:103): it can't be chosen for one layer, so all layers of this
head size run the generic kernel once one does. No time of this kernel is published; what is, of
another patch for the same gap, is flash-attention PR #2749: backward on a B300 13.98 ms with
FlashAttention-2, 4.04 ms with FlashAttention-4. Source: flash-attn-4 4.0.0b36, and compiled for
sm_100 and sm_103, forward and backward, packed, with a window and a soft cap (2026-11-26).
"""

from __future__ import annotations

import os

from attnimg.backends.flash_attention_4 import BACKEND as FLASH_4
from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

_VARIABLES = {"FLASH_ATTENTION_HD256_GENERIC_BWD": "1"}


def _load() -> AttentionFunction:
    os.environ.update(_VARIABLES)
    from attnimg.backends._transformers_flash import flash_kernel

    return flash_kernel(FLASH_4, trusted=False).attend


BACKEND = Backend(
    name="flash_attention_4_generic",
    rank=15,
    rank_why="has a backward pass for head_dim 256 with a window, where FlashAttention-4 has none",
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
    load_attend=_load,
    for_process=_VARIABLES,
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(10, 0), (10, 3)}),
        arch_text="sm_100 or sm_103 (B200, B300)",
        dtypes=FLASH_4.needs.dtypes,
        head_dims=(HeadDims(qk=(256, 256), v=(256, 256), equal=True),),
        features=frozenset({"window", "softcap"}),
        backward=frozenset({"nvidia"}),
        packages=FLASH_4.needs.packages,
    ),
)

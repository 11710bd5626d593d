"""xFormers' memory-efficient attention: the packing kernel for GPUs older than Ampere.

Source: xformers 0.0.35, ops/fmha/{cutlass,flash,common,attn_bias}.py. Read 2026-11-21.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

_BLACKWELL = frozenset({10, 11, 12})


def _load() -> AttentionFunction:
    from attnimg.backends._imports import import_kernel

    ops = import_kernel("xformers.ops", backend="xformers", package="xformers")
    from attnimg.backends._xformers_bias import attend_xformers

    return partial(attend_xformers, ops)


BACKEND = Backend(
    name="xformers",
    rank=54,
    rank_why="is not timed here, and has few kernels that torch lacks",
    rank_source="xformers 0.0.35, ops/fmha/dispatch.py (2026-11-26)",
    ranks=(
        Rank(
            rank=47,
            archs=frozenset({"sm_70", "sm_75"}),
            packed=True,
            why="is the one kernel below sm_80 that takes document boundaries in one call",
            source="xformers 0.0.35, ops/fmha/attn_bias.py, BlockDiagonalMask, and cutlass.py "
            "(2026-11-26)",
        ),
    ),
    summary="xFormers memory-efficient attention",
    packing="native",
    applied_as="attnimg_xformers",
    load_attend=_load,
    needs=Needs(
        vendors=frozenset({"nvidia", "amd"}),
        capability_min=(7, 0),
        gfx=frozenset({"gfx90a", "gfx942"}),
        arch_code="arch-too-old",
        arch_text="sm_70 or newer, gfx90a or gfx942",
        # Blackwell has FlashAttention-2's kernels only, in half precision; cutlass ends at sm_90.
        # Steps of 8 are cutlass's in half precision, where the tensor cores are.
        head_dims=(
            HeadDims(majors=frozenset({7, 8, 9}), multiple=8, multiple_v=8),
            HeadDims(majors=_BLACKWELL, qk=(1, 256), v=(1, 256), multiple=8, equal=True),
        ),
        dtypes_missing=dict.fromkeys(_BLACKWELL, frozenset({"float32"})),
        features=frozenset({"window", "dropout"}),
        backward=frozenset({"nvidia", "amd"}),
        packages=(("xformers", "0.0.33", "not-installed"),),
    ),
)

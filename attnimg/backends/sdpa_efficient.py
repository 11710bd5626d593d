"""scaled_dot_product_attention pinned to its memory-efficient kernel, one document at a time.

Plain sdpa picks an inner kernel by itself; this one is there for when its pick is wrong or slow.
Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of pytorch/pytorch at 001f694 (main,
read 2026-11-21; torch 2.13's own copy: not verified), check_mem_efficient_hardware_support
(sm_50 to sm_121) and minimum_gemm_alignment (8 for half precision, less for float32). On AMD it is
AOTriton, where head sizes end at 256 or 512 by version, and RDNA asks for
TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

_FEATURES = frozenset({"window", "dropout"})


def _load() -> AttentionFunction:
    from attnimg.backends._pinned import attend_pinned

    return partial(attend_pinned, "sdpa_efficient", "EFFICIENT_ATTENTION", _FEATURES)


BACKEND = Backend(
    name="sdpa_efficient",
    rank=52,
    rank_why="comes after PyTorch's flash kernel, which is faster where it fits",
    rank_source="torch at 001f694, sdp_utils.cpp, priority_order (2026-11-26)",
    ranks=(
        Rank(
            rank=67,
            archs=frozenset({"gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"}),
            why="asks for TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 on RDNA",
            source="torch at 001f694, sdp_utils.cpp (2026-11-26)",
        ),
    ),
    summary="PyTorch's memory-efficient attention",
    packing="native",
    in_config=False,
    applied_as="attnimg_torch_efficient",
    load_attend=_load,
    needs=Needs(
        vendors=frozenset({"nvidia", "amd"}),
        capability_min=(5, 0),
        arch_code="arch-too-old",
        arch_text="sm_50 or newer, or AMD CDNA or RDNA",
        head_dims=(HeadDims(multiple=8, multiple_v=8),),
        features=_FEATURES,
        backward=frozenset({"nvidia", "amd"}),
    ),
)

"""scaled_dot_product_attention pinned to its FlashAttention-2, one document at a time.

Plain sdpa picks an inner kernel by itself; this one is there for when its pick is wrong or slow.
Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of pytorch/pytorch at 001f694 (main,
read 2026-11-21; torch 2.13's own copy: not verified), check_flash_attention_hardware_support
(sm_80 to sm_121) and check_head_dim_size_flash. On sm_86, sm_89, sm_120 and sm_121 it refuses to
train with head sizes from 193 to 224, and above with dropout
(check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120). RDNA: see sdpa_efficient.py.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank

_FEATURES = frozenset({"dropout"})


def _load() -> AttentionFunction:
    from attnimg.backends._pinned import attend_pinned

    return partial(attend_pinned, "sdpa_flash", "FLASH_ATTENTION", _FEATURES)


BACKEND = Backend(
    name="sdpa_flash",
    rank=51,
    rank_why="comes after plain sdpa, which may pick it",
    rank_source="torch at 001f694, sdp_utils.cpp, priority_order (2026-11-26)",
    ranks=(
        Rank(
            rank=66,
            archs=frozenset({"gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"}),
            why="asks for TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 on RDNA",
            source="torch at 001f694, sdp_utils.cpp (2026-11-26)",
        ),
    ),
    summary="PyTorch's FlashAttention-2",
    packing="native",
    in_config=False,
    applied_as="attnimg_torch_fa",
    load_attend=_load,
    needs=Needs(
        vendors=frozenset({"nvidia", "amd"}),
        capability_min=(8, 0),
        arch_code="arch-too-old",
        arch_text="sm_80 or newer, or AMD CDNA or RDNA",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), equal=True, multiple=8),),
        features=_FEATURES,
        backward=frozenset({"nvidia", "amd"}),
    ),
)

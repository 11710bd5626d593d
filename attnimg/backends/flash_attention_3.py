"""Define FlashAttention-3, the package flash-attn-3: Hopper only.

Our builds do not contain its sm_80 kernels, and it has none for Blackwell. Sources: flash-attention
0251105a, hopper/flash_api_stable.cpp (dtypes, head_dim, no dropout), setup.py. Read 2026-11-21.
"""

from attnimg.facts import Backend, HeadDims, Needs

BACKEND = Backend(
    name="flash_attention_3",
    rank=20,
    rank_why="is written for Hopper",
    rank_source="flash-attention, README: FlashAttention-3 (2026-11-26)",
    summary="FlashAttention-3",
    packing="native",
    uses_flash_lib=True,
    applied_as="flash_attention_3",
    module="flash_attn_interface",
    hub_repo="kernels-community/vllm-flash-attn3",
    family="flash",
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(9, 0)}),
        arch_code="arch-mismatch",
        arch_text="sm_90 (Hopper)",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), multiple=8),),
        features=frozenset({"window", "softcap"}),
        backward=frozenset({"nvidia"}),
        # The distribution of this name on PyPI is an empty placeholder, version 0.0.0.
        packages=(("flash-attn-3", "3.0.0", "not-installed"),),
    ),
)

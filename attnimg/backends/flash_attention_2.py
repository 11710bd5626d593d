"""Define FlashAttention-2, the package flash-attn: Ampere and newer, and AMD's CDNA and RDNA.

Sources: flash-attn 2.8.3.post2's sdist, flash_api.cpp lines 370-397 (arch, dtypes, head_dim; a soft
cap without dropout) and 829-830 (backward); setup.py (AMD targets). Read 2026-11-21.
"""

from attnimg.facts import Backend, HeadDims, Needs, Variant

# The names of FlashAttention's functions, in all versions and in kernels of the hub.
DENSE, VARLEN = "flash_attn_func", "flash_attn_varlen_func"
# Feature -> the names of its argument in flash-attn 2 and 3, vLLM's flash-attn 3, flash-attn 4.
ARGUMENTS = {
    "window": ("window_size",),
    "softcap": ("softcap",),
    "sinks": ("s_aux", "learnable_sink"),
    "dropout": ("dropout_p",),
}

# One wheel has both sets; the variable is read at import.
# Source: flash_attn_interface.py:11-16 (2026-11-25).
_TRITON = Variant(name="Triton", variables={"FLASH_ATTENTION_TRITON_AMD_ENABLE": "TRUE"})
_CK = Variant(name="CK", variables={"FLASH_ATTENTION_TRITON_AMD_ENABLE": "FALSE"})
_CDNA = ("gfx90a", "gfx942", "gfx950")
_RDNA = ("gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201")
# RDNA 2 to 4 run the Triton kernels, whose entry points accept a window and a soft cap but ignore
# both, and use a constant dropout seed: the same dropout mask in each layer and step.
# Source: flash_attn/flash_attn_triton_amd, interface_fa.py:16-147 and 355-495, utils.py:122-126.
# The dense kernels were tested in Triton's interpreter (2026-11-25).
_TRITON_LACKS = frozenset({"window", "softcap", "dropout"})
# CDNA's CK kernels accept a soft cap and silently ignore it: mha_fwd.cpp:156,
# mha_varlen_fwd.cpp:316, mha_bwd.cpp:212, mha_varlen_bwd.cpp:223 of csrc/flash_attn_ck
# (flash-attn 2.8.3.post2, 2026-11-26).
_CK_LACKS = frozenset({"softcap"})

BACKEND = Backend(
    name="flash_attention_2",
    rank=30,
    rank_why="accepts document boundaries (cu_seqlens) in one call",
    rank_source="flash-attention, README (2026-11-26)",
    summary="FlashAttention-2",
    packing="native",
    uses_flash_lib=True,
    applied_as="flash_attention_2",
    module="flash_attn",
    hub_repo="kernels-community/flash-attn2",
    family="flash",
    variants={**dict.fromkeys(_CDNA, _CK), **dict.fromkeys(_RDNA, _TRITON)},
    needs=Needs(
        vendors=frozenset({"nvidia", "amd"}),
        capability_min=(8, 0),
        gfx=frozenset({*_CDNA, *_RDNA}),
        arch_code="arch-too-old",
        arch_text="sm_80 or newer (Ampere), or gfx90a, gfx942, gfx950, gfx1030, gfx110x, gfx120x",
        dtypes=frozenset({"float16", "bfloat16"}),
        # transformers pads v to the head_dim of q and k, so v may be smaller.
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), multiple=8),),
        features=frozenset({"window", "softcap", "dropout"}),
        exclusive=frozenset({"softcap", "dropout"}),
        features_missing={
            **dict.fromkeys(_CDNA, _CK_LACKS),
            **dict.fromkeys(_RDNA, _TRITON_LACKS),
        },
        backward=frozenset({"nvidia", "amd"}),
        packages=(("flash-attn", "2.3.3", "not-installed"),),
    ),
)

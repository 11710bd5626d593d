"""SageAttention 2: q and k in int8, forward only, so gradients come from exact attention.

An approximation, so `auto` never takes it. Source: SageAttention d1a57a5, sageattention/core.py
lines 143-157 (which GPUs it dispatches) and its head_dim checks. Read 2026-11-21.
"""

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs


def _load() -> AttentionFunction:
    from attnimg.backends._imports import import_kernel

    package = import_kernel("sageattention", backend="sage", package="sageattention")
    from attnimg.backends._sage import SageKernel

    varlen = getattr(package, "sageattn_varlen", None)
    return SageKernel(backend="sage", dense=package.sageattn, varlen=varlen).attend


BACKEND = Backend(
    name="sage",
    rank=70,
    rank_why="approximates",
    rank_source="SageAttention, README (2026-11-21)",
    summary="SageAttention (int8 QK)",
    packing="native",
    automatic=False,
    applied_as="attnimg_sage",
    load_attend=_load,
    k_forward=None,
    sqnr_db=20.0,
    tolerance_source="ours: SageAttention's repository has no accuracy test (2026-11-21)",
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1)}),
        arch_code="sage-arch",
        arch_text="sm_80, sm_86, sm_89, sm_90, sm_120 or sm_121",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 128), v=(1, 128), equal=True),),
        features=frozenset(),
        packages=(("sageattention", "2.2.0", "not-installed"),),
    ),
)

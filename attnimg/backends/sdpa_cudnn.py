"""scaled_dot_product_attention pinned to its cuDNN kernel, one document at a time.

Plain sdpa picks an inner kernel by itself; this one is there for when its pick is wrong or slow.
Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of pytorch/pytorch at 001f694 (main,
read 2026-11-21; torch 2.13's own copy: not verified), check_cudnn_hardware_support and
check_cudnn_tensor_shapes. There the newest cuDNN also takes 256 and MLA's (192, 128) on sm_90 and
sm_10x. It refuses a single key, which _pinned.py computes otherwise, and dropout that is no
multiple of 1/16 (check_cudnn_dropout). It builds a plan for each new shape, so each new length of a
document costs up to a second, once in a process; see verify/compiled.py.
"""

from functools import partial

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs

_FEATURES = frozenset({"dropout"})


def _load() -> AttentionFunction:
    from attnimg.backends._pinned import attend_pinned

    return partial(attend_pinned, "sdpa_cudnn", "CUDNN_ATTENTION", _FEATURES)


BACKEND = Backend(
    name="sdpa_cudnn",
    rank=53,
    rank_why="comes after PyTorch's other fused kernels until it is timed here",
    rank_source="ours: unmeasured (2026-11-26)",
    summary="PyTorch's cuDNN attention",
    packing="native",
    in_config=False,
    applied_as="attnimg_torch_cudnn",
    load_attend=_load,
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capability_min=(8, 0),
        arch_code="arch-too-old",
        arch_text="sm_80 or newer",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(8, 128), v=(8, 128), equal=True, multiple=8),),
        features=_FEATURES,
        backward=frozenset({"nvidia", "amd"}),
    ),
)

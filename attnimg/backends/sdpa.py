"""Define PyTorch's own attention: eager, sdpa, and one backend for each inner kernel of sdpa.

eager computes matrix products and softmax, on every device.

sdpa is always available and chooses its inner kernel. For packed rows it gets a block-diagonal
mask, whose memory is quadratic in the row length and which its flash kernel does not support.
Source: transformers 5.22.2, masking_utils.py (read 2026-11-21). On sm_90 and sm_10x it prefers
cuDNN's kernel, which builds a plan for each new shape, in up to a second;
TORCH_CUDNN_SDPA_DEPRIORITIZED=1 gives that kernel the lowest priority. The proof therefore uses few
shapes: see reduce_shapes in verification/cases.py.

The backends for inner kernels are for cases where sdpa chooses a wrong or slow kernel; they get
one document at a time. Source of their limits, unless another is given:
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp of pytorch/pytorch at 001f694 (main, read
2026-11-21; torch 2.13's own copy: not verified).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs, Rank, Vendor

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall

# Kernels that refuse calls with one key, as for a packed document of one token. Source:
# pytorch, sdp_utils.cpp, check_cudnn_tensor_shapes (2026-11-26); seen on an H200 with torch 2.11,
# where the flash and the efficient kernel accept them.
_NO_SINGLE_KEY = frozenset({"CUDNN_ATTENTION"})
_GPUS: frozenset[Vendor] = frozenset({"nvidia", "amd"})


def _load(backend: str, inner: str, features: frozenset[str]) -> AttentionFunction:
    """Return attention by one inner kernel of sdpa, which gets one document at a time.

    torch uses the kernel of that name in SDPBackend or raises RuntimeError; it does not fall back
    to another. Where a kernel refuses a single key, torch's math kernel is used: with one key the
    softmax is 1 and the output is v.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from attnimg.backends._exact import exact_kernel
    from attnimg.backends._varlen import as_attention_function, attention_by_document

    def compute(call: AttentionCall) -> Tensor:
        exact = exact_kernel(call)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            single = k.shape[2] == 1 and inner in _NO_SINGLE_KEY
            with sdpa_kernel(SDPBackend.MATH if single else getattr(SDPBackend, inner)):
                return exact(q, k, v)

        return attention_by_document(call, dense)

    return as_attention_function(backend, features, compute)


def _pinned(name: str, inner: str, needs: Needs, **fields: Any) -> Backend:
    return Backend(
        name=name,
        packing="native",
        in_config=False,
        load_function=partial(_load, name, inner, needs.features),
        needs=needs,
        **fields,
    )


def _last_on_rdna(rank: int) -> Rank:
    return Rank(
        rank=rank,
        archs=frozenset({"gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1200", "gfx1201"}),
        why="needs TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1 on RDNA",
        source="torch at 001f694, sdp_utils.cpp (2026-11-26)",
    )


BACKENDS = (
    Backend(
        name="eager",
        rank=90,
        rank_why="supports every model, but stores all attention scores of a row",
        rank_source="transformers 5.22.2, eager_attention_forward (2026-11-26)",
        summary="plain PyTorch attention",
        packing="mask",
        needs_dtype_cast=False,
        applied_as="eager",
        mask="eager",
        # Source: transformers 5.22.2, eager_attention_forward of gemma2 and of gpt_oss: no function
        # of transformers has both (2026-11-27).
        needs=Needs(exclusive=frozenset({"softcap", "sinks"})),
    ),
    Backend(
        name="sdpa",
        rank=50,
        rank_why="chooses among PyTorch's own kernels",
        rank_source="torch 2.13, docstring of scaled_dot_product_attention (2026-11-26)",
        ranks=(
            Rank(
                rank=62,
                packed=True,
                routed=False,
                why="gets packed rows with a mask, and computes scores over the whole row",
                source="transformers 5.22.2, masking_utils.py:find_packed_sequence_indices "
                "(2026-11-26)",
            ),
        ),
        summary="PyTorch scaled_dot_product_attention",
        packing="mask",
        needs_dtype_cast=False,
        applied_as="sdpa",
        mask="sdpa",
        # It has no argument for a soft cap or for sinks: transformers refuses a soft cap, and its
        # models with sinks declare sdpa unsupported. Source: torch 2.13, signature; transformers
        # 5.22.2.
        needs=Needs(features=frozenset({"window", "dropout"})),
    ),
    # check_flash_attention_hardware_support (sm_80 to sm_121) and check_head_dim_size_flash. On
    # sm_86, sm_89, sm_120 and sm_121 it refuses to train with head sizes from 193 to 224, and with
    # larger ones and dropout
    # (check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120).
    _pinned(
        "sdpa_flash",
        "FLASH_ATTENTION",
        Needs(
            vendors=_GPUS,
            capability_min=(8, 0),
            arch_code="arch-too-old",
            arch_text="sm_80 or newer, or AMD CDNA or RDNA",
            dtypes=frozenset({"float16", "bfloat16"}),
            head_dims=(HeadDims(qk=(1, 256), v=(1, 256), equal=True, multiple=8),),
            features=frozenset({"dropout"}),
            backward=_GPUS,
        ),
        rank=51,
        rank_why="comes after plain sdpa, which may choose it",
        rank_source="torch at 001f694, sdp_utils.cpp, priority_order (2026-11-26)",
        ranks=(_last_on_rdna(66),),
        summary="PyTorch's FlashAttention-2",
        applied_as="attnimg_torch_fa",
    ),
    # check_mem_efficient_hardware_support (sm_50 to sm_121) and minimum_gemm_alignment (8 for half
    # precision, less for float32). On AMD it is AOTriton, whose largest head size is 256 or 512,
    # depending on its version; RDNA requires TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1.
    _pinned(
        "sdpa_efficient",
        "EFFICIENT_ATTENTION",
        Needs(
            vendors=_GPUS,
            capability_min=(5, 0),
            arch_code="arch-too-old",
            arch_text="sm_50 or newer, or AMD CDNA or RDNA",
            head_dims=(HeadDims(multiple=8, multiple_v=8),),
            features=frozenset({"window", "dropout"}),
            backward=_GPUS,
        ),
        rank=52,
        rank_why="comes after PyTorch's flash kernel, which is faster where it fits",
        rank_source="torch at 001f694, sdp_utils.cpp, priority_order (2026-11-26)",
        ranks=(_last_on_rdna(67),),
        summary="PyTorch's memory-efficient attention",
        applied_as="attnimg_torch_efficient",
    ),
    # check_cudnn_hardware_support and check_cudnn_tensor_shapes: the newest cuDNN also supports
    # 256 and MLA's (192, 128) on sm_90 and sm_10x. It refuses a single key, and dropout that is
    # not a multiple of 1/16 (check_cudnn_dropout). It builds a plan for each new shape, so each
    # new document length costs up to a second, once per process.
    _pinned(
        "sdpa_cudnn",
        "CUDNN_ATTENTION",
        Needs(
            vendors=frozenset({"nvidia"}),
            capability_min=(8, 0),
            arch_code="arch-too-old",
            arch_text="sm_80 or newer",
            dtypes=frozenset({"float16", "bfloat16"}),
            head_dims=(HeadDims(qk=(8, 128), v=(8, 128), equal=True, multiple=8),),
            features=frozenset({"dropout"}),
            backward=_GPUS,
        ),
        rank=53,
        rank_why="comes after PyTorch's other fused kernels until it is timed here",
        rank_source="attnimg: not measured yet (2026-11-26)",
        summary="PyTorch's cuDNN attention",
        applied_as="attnimg_torch_cudnn",
    ),
    # It is slow and stores all scores of a document, but runs on every device and supports every
    # head size: torch 2.13, the docstring of torch.nn.functional.scaled_dot_product_attention,
    # has limits for "fused kernels" only (2026-11-25).
    _pinned(
        "sdpa_math",
        "MATH",
        Needs(features=frozenset({"window", "dropout"})),
        rank=85,
        rank_why="stores the attention scores of one document, where eager stores those of a row",
        rank_source="torch 2.13, docstring of scaled_dot_product_attention (2026-11-25)",
        summary="PyTorch's plain attention",
        applied_as="attnimg_torch_math",
    ),
)

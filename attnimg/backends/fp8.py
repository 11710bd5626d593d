"""Define torchao's fp8 attention: FlashAttention-3 on Hopper, without a backward pass.

The forward pass is in fp8, the backward pass is exact attention. torchao's public API wraps the
model, replaces F.scaled_dot_product_attention while it runs, sets a global compiler pass, and drops
masks after it has seen one causal call: packed or padded batches would be wrong. attnimg calls the
function below that API, which takes q, k and v, and does not change the model. Source:
torchao 0.18.0, prototype/attention/__init__.py ("backward is not supported"), api.py, utils.py and
fp8_fa3/attention.py. Read 2026-11-21.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnimg.facts import AttentionFunction, Backend, HeadDims, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from attnimg.backends._varlen import AttentionCall


def _load() -> AttentionFunction:
    from attnimg.backends._loading import import_kernel

    name = "torchao.prototype.attention.fp8_fa3.attention"
    return fp8_attention(import_kernel(name, backend="fp8", package="torchao").fp8_fa3_sdpa)


def fp8_attention(kernel: Callable[..., Any]) -> AttentionFunction:
    """Return the attention function for torchao's fp8_fa3_sdpa.

    It refuses packed or padded rows, and a KV cache with earlier tokens.
    """
    from attnimg.backends._exact import exact_kernel, with_exact_backward
    from attnimg.backends._loading import kernel_error
    from attnimg.backends._varlen import as_attention_function, packed_tokens, repeat_kv
    from attnimg.errors import set_backend

    def compute(call: AttentionCall) -> Tensor:
        if packed_tokens(call) is not None or call.q.shape[2] != call.k.shape[2]:
            raise kernel_error(
                "fp8 can't compute this batch",
                why="found packed, padded or cached rows; its kernel takes no mask",
                do="set sample_packing: false and micro_batch_size: 1, or " + set_backend("sdpa"),
                code="packing-not-isolated",
            )
        # torchao accepts enable_gqa but ignores it.
        k, v = repeat_kv(call.q, call.k, call.v)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            _activate_fa3()
            found: Tensor = kernel(q, k, v, is_causal=call.causal, scale=call.scale)
            return found

        return with_exact_backward(forward, exact_kernel(call), call.q, k, v).transpose(1, 2)

    return as_attention_function("fp8", (), compute)


def _activate_fa3() -> None:
    """Set FlashAttention-3 as torch's flash kernel in this process; torchao's function needs it.

    This registers seven overrides of aten operators, so it is done once and not undone after each
    call. Every later scaled_dot_product_attention on the flash kernel uses FlashAttention-3 too,
    including the exact backward pass.
    Source: torch 2.13.0, nn/attention/_fa3.py, _fa3_register_kernels (2026-11-26).
    """
    from torch.nn import attention

    if attention.current_flash_attention_impl() != "FA3":
        attention.activate_flash_attention_impl("FA3")


def restore_flash_kernel() -> None:
    """Restore torch's built-in flash kernel in this process."""
    from torch.nn import attention

    # torch before 2.11 has only one flash kernel.
    current = getattr(attention, "current_flash_attention_impl", None)
    if current is not None and current() is not None:
        attention.restore_flash_attention_impl()


BACKEND = Backend(
    name="fp8",
    rank=75,
    rank_why="is an approximation",
    rank_source="torchao 0.18.0, prototype/attention (2026-11-21)",
    summary="torchao fp8 attention",
    packing="none",
    automatic=False,
    forward_only=True,
    applied_as="attnimg_fp8",
    load_function=_load,
    k_forward=None,
    sqnr_db=25.0,
    tolerance_source="pytorch/ao, test_fp8_attention.py: SQNR above 25 dB (2026-11-21)",
    needs=Needs(
        vendors=frozenset({"nvidia"}),
        capabilities=frozenset({(9, 0)}),
        arch_code="fp8-arch",
        arch_text="sm_90 (Hopper), the only one that torchao 0.18 supports",
        dtypes=frozenset({"float16", "bfloat16"}),
        head_dims=(HeadDims(qk=(1, 256), v=(1, 256), equal=True),),
        features=frozenset(),
        backward=frozenset(),
        backward_code="fp8-no-backward",
        packages=(
            ("torchao", "0.17", "fp8-torchao"),
            ("flash-attn-3", "3.0.0", "fp8-needs-fa3"),
        ),
        torch_min=("2.11", "fp8-torch"),
    ),
)

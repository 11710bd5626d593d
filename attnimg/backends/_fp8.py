"""Call torchao's fp8 attention: forward in fp8 on FlashAttention-3, backward by exact attention.

torchao's own way in wraps the model, swaps F.scaled_dot_product_attention while it runs, sets a
global compiler pass and drops masks once it saw one causal call. The function beneath it takes
q, k and v, so the model is trained as it is. Source: torchao 0.18.0, prototype/attention/api.py and
fp8_fa3/attention.py (read 2026-11-21).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnimg.backends._arguments import read_call
from attnimg.backends._documents import documents_of
from attnimg.backends._exact import exact_kernel
from attnimg.backends._forward_only import with_exact_backward
from attnimg.errors import AttnimgError


def attend_fp8(
    kernel: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; see attnimg.backends._attend.

    Args:
        kernel: torchao's fp8_fa3_sdpa.
        module: the model's attention layer.
        query: (B, H, T, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        mask: must be None: no row is padded.
        arguments: what else the model passes.

    Raises:
        AttnimgError: rows are packed or padded, or the cache holds earlier tokens.
    """
    call = read_call("fp8", module, query, key, value, mask, honours=frozenset(), **arguments)
    if documents_of(call) is not None or call.q.shape[2] != call.k.shape[2]:
        raise AttnimgError(
            "fp8 can't do this batch",
            why="found packed, padded or cached rows; its kernel takes no mask",
            do="set sample_packing: false and micro_batch_size: 1, or attn_implementation: sdpa",
            code="packing-not-isolated",
            key="attn_implementation",
            exit_code=1,
        )
    group = call.q.shape[1] // call.k.shape[1]
    # torchao takes enable_gqa and does not hand it on.
    k, v = (x.repeat_interleave(group, dim=1) for x in (call.k, call.v))

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        activate_fa3()
        found: Tensor = kernel(q, k, v, is_causal=call.causal, scale=call.scale)
        return found

    out = with_exact_backward(forward, exact_kernel(call), call.q, k, v)
    return out.transpose(1, 2), None


def activate_fa3() -> None:
    """Make FlashAttention-3 the flash kernel of this process, as torchao's function needs it.

    Activating registers seven overrides of aten's operators, so it is done once and not undone
    after each call: every later scaled_dot_product_attention on flash kernels runs on
    FlashAttention-3 too, the exact backward pass included.
    Source: torch 2.13.0, nn/attention/_fa3.py, _fa3_register_kernels (2026-11-26).
    """
    from torch.nn import attention

    if attention.current_flash_attention_impl() != "FA3":
        attention.activate_flash_attention_impl("FA3")


def restore_flash_kernel() -> None:
    """Make torch's own flash kernel that of this process again."""
    from torch.nn import attention

    # torch before 2.11 knows one alone.
    current = getattr(attention, "current_flash_attention_impl", None)
    if current is not None and current() is not None:
        attention.restore_flash_attention_impl()

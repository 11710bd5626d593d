"""scaled_dot_product_attention with one of its inner kernels and no other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnimg.calls.arguments import read_call
from attnimg.calls.exact import attend_exactly


def attend_pinned(
    backend: str,
    inner: str,
    honours: frozenset[str],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks, document by document, on one inner kernel.

    torch takes that kernel or raises RuntimeError: it never falls back to another.

    Args:
        backend: who is called, for errors.
        inner: a name of torch.nn.attention.SDPBackend, "CUDNN_ATTENTION".
        honours: which features of arguments.py the kernel can do.
        module: the model's attention layer.
        query: (B, H, T, D), and so on: see attnimg.attend.
        key: (B, G, S, D).
        value: (B, G, S, V).
        mask: None, or True where a token is none of the padding, (B, S).
        arguments: what else the model passes.
    """
    call = read_call(backend, module, query, key, value, mask, honours=honours, **arguments)
    with sdpa_kernel(getattr(SDPBackend, inner)):
        return attend_exactly(call), None

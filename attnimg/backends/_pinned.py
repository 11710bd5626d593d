"""scaled_dot_product_attention with one of its inner kernels and no other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnimg.backends._arguments import read_call
from attnimg.backends._documents import attend_by_document
from attnimg.backends._exact import exact_kernel

# These refuse calls of one key, which packed rows have: a document may be one token long. Source:
# pytorch, sdp_utils.cpp, check_cudnn_tensor_shapes (2026-11-26); seen on an H200 with torch 2.11.
# Flash and efficient take them there.
_NO_SINGLE_KEY = frozenset({"CUDNN_ATTENTION"})


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

    torch takes that kernel or raises RuntimeError: it never falls back to another. Where a kernel
    refuses a single key, torch's plain one attends: over one key every kernel's softmax is 1, and
    its output v.

    Args:
        backend: who is called, for errors.
        inner: a name of torch.nn.attention.SDPBackend, "CUDNN_ATTENTION".
        honours: which features of arguments.py the kernel can do.
        module: the model's attention layer.
        query: (B, H, T, D), and so on: see attnimg.backends._attend.
        key: (B, G, S, D).
        value: (B, G, S, V).
        mask: None, or True where a token is none of the padding, (B, S).
        arguments: what else the model passes.
    """
    call = read_call(backend, module, query, key, value, mask, honours=honours, **arguments)
    exact = exact_kernel(call)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        single = k.shape[2] == 1 and inner in _NO_SINGLE_KEY
        with sdpa_kernel(SDPBackend.MATH if single else getattr(SDPBackend, inner)):
            return exact(q, k, v)

    return attend_by_document(call, dense), None

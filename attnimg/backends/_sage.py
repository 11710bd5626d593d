"""Call SageAttention's entry points: forward in int8, backward by exact attention.

Letters: see arguments.py; N is the query tokens of all documents together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._arguments import Call, read_call
from attnimg.backends._documents import Documents, attend_by_document, one_by_one
from attnimg.backends._exact import exact_kernel
from attnimg.backends._forward_only import with_exact_backward
from attnimg.errors import AttnimgError


@dataclass(frozen=True, kw_only=True, slots=True)
class SageKernel:
    """SageAttention's entry points.

    Attributes:
        backend: whose they are, for errors.
        dense: sageattn, or one of its variants with the same arguments.
        varlen: sageattn_varlen; None sends each document through `dense`.
    """

    backend: str
    dense: Callable[..., Any]
    varlen: Callable[..., Any] | None = None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks; see attnimg.backends._attend.

        Raises:
            AttnimgError: the model passes something that the kernel does not know.
        """
        call = read_call(
            self.backend, module, query, key, value, mask, honours=frozenset(), **arguments
        )
        dtype = _half_precision(query)
        if dtype is not query.dtype:
            call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))
        return attend_by_document(
            call,
            lambda q, k, v: self._dense(call, q, k, v),
            (lambda documents: self._packed(call, documents)) if self.varlen else None,
        ), None

    def _dense(self, call: Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q (B, H, T, D); gives (B, H, T, V)."""
        causal = call.causal and q.shape[2] > 1
        if causal and q.shape[2] != k.shape[2]:
            raise AttnimgError(
                f"{self.backend} can't do this batch",
                why=f"found {q.shape[2]} queries on {k.shape[2]} keys; causal needs as many",
                do="set attn_implementation: sdpa",
                code="argument-not-honoured",
                key="attn_implementation",
                exit_code=1,
            )

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = self.dense(
                q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=call.scale
            )
            return found

        return with_exact_backward(kernel, exact_kernel(call), q, k, v)

    def _packed(self, call: Call, documents: Documents) -> Tensor:
        """Attend within documents; gives (N, H, V)."""
        assert self.varlen is not None
        varlen, exact = self.varlen, exact_kernel(call)

        def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found: Tensor = varlen(
                q,
                _centred(k, documents.bounds_k),
                v,
                documents.bounds_q,
                documents.bounds_k,
                documents.longest_q,
                documents.longest_k,
                is_causal=call.causal,
                sm_scale=call.scale,
                # It would take the mean over all documents: one would change another's rounding.
                smooth_k=False,
            )
            return found

        def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return one_by_one(replace(documents, q=q, k=k, v=v), exact)

        return with_exact_backward(kernel, exactly, documents.q, documents.k, documents.v)


def _centred(k: Tensor, bounds: Tensor) -> Tensor:
    """Take each document's mean off its keys, (M, G, D), which softmax does not see.

    It takes out what int8 would spend its range on. Source: SageAttention2, arXiv 2411.10958,
    section 3.1.
    """
    lengths = bounds.diff()
    document = torch.repeat_interleave(
        torch.arange(len(lengths), device=k.device), lengths, output_size=len(k)
    )
    sums = k.new_zeros(len(lengths), *k.shape[1:], dtype=torch.float32)
    means = sums.index_add(0, document, k.float()) / lengths.clamp(min=1)[:, None, None]
    return (k.float() - means[document]).to(k.dtype)


def _half_precision(query: Tensor) -> torch.dtype:
    """Give the precision of the run where PEFT's float32 norms made the queries float32."""
    if query.dtype is not torch.float32 or not torch.is_autocast_enabled(query.device.type):
        return query.dtype
    return torch.get_autocast_dtype(query.device.type)

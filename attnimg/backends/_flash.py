"""Call a kernel with FlashAttention's two entry points, whatever its version takes.

Letters: see arguments.py; N is the query tokens of all documents together.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnimg.backends._arguments import Call, read_call
from attnimg.backends._documents import Documents, attend_by_document
from attnimg.errors import AttnimgError

# Our word for an argument, and each version's own: flash-attn 2 and 3, vLLM's 3, flash-attn 4.
_NAMES = {
    "dropout": ("dropout_p",),
    "window": ("window_size",),
    "softcap": ("softcap",),
    "sinks": ("s_aux", "learnable_sink"),
}


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel's entry point that runs outside of torch.autocast, as its backward pass does.

    q, k and v have the precision of the run before they reach a kernel. One that is written with
    torch's own operations would have its float32 intermediates cast in the forward pass alone, and
    its gradients would not be those of its output. Compiled kernels see no difference.
    """

    @wraps(function)
    def attend(q: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **kwargs)

    attend.runs_without_autocast = True  # type: ignore[attr-defined]  # read by transformers_flash
    return attend


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashKernel:
    """FlashAttention's entry points and what they take.

    Attributes:
        backend: whose they are, for errors.
        dense: flash_attn_func; None when the kernel has none.
        varlen: flash_attn_varlen_func; None likewise.
        unpadded_v: whether v may have another head size than q and k.
    """

    backend: str
    dense: Callable[..., Any] | None
    varlen: Callable[..., Any] | None
    unpadded_v: bool = False

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any
    ) -> tuple[Tensor, None]:
        """Attend as transformers asks; see attnimg.backends._attend.

        Raises:
            AttnimgError: the model passes something that the kernel has no argument for.
        """
        function = self.varlen or self.dense
        assert function is not None
        takes = _arguments_of(function)
        honours = {ours for ours, theirs in _NAMES.items() if any(name in takes for name in theirs)}
        call = read_call(
            self.backend, module, query, key, value, mask, honours=frozenset(honours), **arguments
        )
        options = _options(call, takes)
        return attend_by_document(
            call,
            (lambda q, k, v: self._dense(q, k, v, options)) if self.dense else None,
            lambda documents: self._packed(documents, options),
        ), None

    def _dense(self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """Attend with q (B, H, T, D); gives (B, H, T, V)."""
        q_BTHD, k_BSGD, v_BSGV = (x.transpose(1, 2) for x in (q, k, v))
        v_BSGV, crop = self._padded(v_BSGV, q)
        assert self.dense is not None
        dense = without_autocast(self.dense)
        return _output(dense(q_BTHD, k_BSGD, v_BSGV, **options))[..., :crop].transpose(1, 2)

    def _packed(self, documents: Documents, options: dict[str, Any]) -> Tensor:
        """Attend within documents; gives (N, H, V)."""
        if self.varlen is None:
            raise AttnimgError(
                f"{self.backend} can't do packed or padded rows",
                why="it exports no flash_attn_varlen_func: packed documents would mix",
                do="set sample_packing: false and micro_batch_size: 1, or another backend",
                code="packing-not-isolated",
                key="attn_implementation",
                exit_code=1,
            )
        v, crop = self._padded(documents.v, documents.q)
        out = without_autocast(self.varlen)(
            documents.q,
            documents.k,
            v,
            # flash-attn 4 has another argument in fourth place.
            cu_seqlens_q=documents.bounds_q,
            cu_seqlens_k=documents.bounds_k,
            max_seqlen_q=documents.longest_q,
            max_seqlen_k=documents.longest_k,
            **options,
        )
        return _output(out)[..., :crop]

    def _padded(self, v: Tensor, q: Tensor) -> tuple[Tensor, int]:
        size = v.shape[-1]
        if self.unpadded_v or size == q.shape[-1]:
            return v, size
        return pad(v, (0, q.shape[-1] - size)), size


@cache
def _arguments_of(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _options(call: Call, takes: frozenset[str]) -> dict[str, Any]:
    """Return the keyword arguments of a call under the kernel's own names."""
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal}
    if call.window is not None:
        # Both ends count: (3, 3) is four keys up to the query, and `causal` hides the rest.
        options["window_size"] = (call.window - 1, call.window - 1)
    if call.softcap:
        options["softcap"] = call.softcap
    if call.dropout:
        options["dropout_p"] = call.dropout
    if call.sinks is not None:
        name = next(name for name in _NAMES["sinks"] if name in takes)
        options[name] = call.sinks.to(call.q.dtype)
    if "deterministic" in takes and os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1":
        options["deterministic"] = True
    return options


def _output(found: Any) -> Tensor:
    """Take the output from kernels that give the softmax's logarithm beside it."""
    return found[0] if isinstance(found, tuple) else found

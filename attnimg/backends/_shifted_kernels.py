"""The kernels that may run the groups of shifted sparse attention: those that take documents.

Letters: see arguments.py; P is T as shifted_sparse.py fills it up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._arguments import Call
from attnimg.backends._flash import FlashKernel
from attnimg.backends._hub_kernels import load_hub_kernel, served_locally
from attnimg.backends._imports import import_kernel
from attnimg.backends._torch_varlen import attend_varlen
from attnimg.errors import AttnimgError

_SERVED = "kernels-community/flash-attn2"
# FlashAttention-2 and torch's varlen_attn, which is built from it: sm_80 up, half precision, head
# sizes that are multiples of 8 up to 256. Source: backends/flash_attention_2.py and varlen_attn.py.
_CAPABILITY_MIN = (8, 0)
_HEAD_DIM_MAX = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupKernel:
    """A kernel that attends within documents.

    Attributes:
        attend: (module, q, k, v, mask, **arguments) to (B, T, H, V), as in backends._attend.
        on_cpu: whether it runs on a CPU, in any dtype; else on a GPU, in half precision.
        has_dropout: whether it can drop weights.
    """

    attend: Callable[..., Tensor]
    on_cpu: bool
    has_dropout: bool

    def takes(self, call: Call) -> bool:
        """Tell whether it can run a call's groups."""
        q, v = call.q, call.v
        if call.dropout and not self.has_dropout:
            return False
        if self.on_cpu or q.device.type == "cpu":
            return self.on_cpu and q.device.type == "cpu"
        return (
            q.device.type == "cuda"
            and q.dtype in (torch.float16, torch.bfloat16)
            and q.shape[-1] == v.shape[-1] <= _HEAD_DIM_MAX
            and q.shape[-1] % 8 == 0
            and torch.cuda.get_device_capability(q.device) >= _CAPABILITY_MIN
        )

    def attend_groups(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, *, lengths: list[int]
    ) -> Tensor:
        """Attend causally within stretches of each row, one after another.

        Args:
            call: whose scale and dropout to take.
            q: (B, heads, P, D).
            k: (B, heads, P, D).
            v: (B, heads, P, V).
            lengths: of the stretches of a row; P in all.

        Returns:
            (B, heads, P, V).
        """
        ends = list(accumulate(lengths * q.shape[0], initial=0))
        bounds = torch.tensor(ends, dtype=torch.int32, device=q.device)
        out = self.attend(
            SimpleNamespace(is_causal=True),
            q,
            k,
            v,
            None,
            scaling=call.scale,
            dropout=call.dropout,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
        )
        return out.transpose(1, 2)


def group_kernels() -> tuple[GroupKernel, ...]:
    """Load what is here: FlashAttention-2, installed or served locally, then torch's varlen_attn.

    One that does not load is said, and left out.
    """
    found = (_loaded(_flash, "flash-attn"), _loaded(_torch_varlen, "varlen_attn"))
    return tuple(kernel for kernel in found if kernel is not None)


def _loaded(load: Callable[[], GroupKernel | None], name: str) -> GroupKernel | None:
    try:
        return load()
    except AttnimgError as error:
        logging.getLogger(__name__).warning("attnimg: s2 goes without %s: %s", name, error.why)
        return None


def _flash() -> GroupKernel | None:
    served = _SERVED in served_locally()
    if served:
        module: Any = load_hub_kernel(_SERVED, trusted=False)
    elif find_spec("flash_attn") is not None and torch.cuda.is_available():
        module = import_kernel("flash_attn", backend="flash_attention_2", package="flash-attn")
    else:
        return None
    varlen = getattr(module, "flash_attn_varlen_func", None)
    if varlen is None:
        return None
    kernel = FlashKernel(backend="s2", dense=None, varlen=varlen)

    def attend(*tensors: Any, **arguments: Any) -> Tensor:
        return kernel.attend(*tensors, **arguments)[0]

    return GroupKernel(
        attend=attend, on_cpu=served and not torch.cuda.is_available(), has_dropout=True
    )


def _torch_varlen() -> GroupKernel | None:
    # It has no CPU kernel. Source: backends/varlen_attn.py.
    if not torch.cuda.is_available():
        return None
    module = import_kernel("torch.nn.attention.varlen", backend="varlen_attn", package="torch")
    attend = partial(attend_varlen, module.varlen_attn, honours=frozenset())
    return GroupKernel(attend=attend, on_cpu=False, has_dropout=False)

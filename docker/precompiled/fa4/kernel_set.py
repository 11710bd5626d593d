"""The calls of FlashAttention-4 whose kernels are compiled: every shape in every way."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One way to call FlashAttention-4; always causal.

    Attributes:
        head_dim: of q and k.
        head_dim_v: of v.
        heads_per_kv: query heads for one key/value head.
        window: whether there is a sliding window; no kernel depends on its length.
        softcap: of the logits; 0 without one.
        sinks: whether each head has a learned sink.
        varlen: packed documents (cu_seqlens) instead of rows of equal length.
        gradient: forward with the tensors for backward, and backward; otherwise forward only.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    heads_per_kv: int
    window: bool
    softcap: float
    sinks: bool
    varlen: bool
    gradient: bool

    def __str__(self) -> str:
        """Return a name that can be a file name: d128-gqa4-window-varlen-gradient-bfloat16."""
        size = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            size += f"v{self.head_dim_v}"
        parts = [size, f"gqa{self.heads_per_kv}"]
        parts += ["window"] * self.window + ["sinks"] * self.sinks
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += ["varlen" if self.varlen else "dense"]
        return "-".join([*parts, "gradient" if self.gradient else "forward", self.dtype])


def calls_of(asked: dict[str, Any], device: str) -> tuple[Call, ...]:
    """Return each shape of a target, packed and not, for training and without gradients.

    Args:
        asked: docker/images/IMAGE/fa4_kernels.json.
        device: as the GPU names itself, "sm_90".
    """
    axes = (asked[axis] for axis in ("dtypes", "varlen", "gradient"))
    return tuple(
        Call(**shape, dtype=dtype, varlen=varlen, gradient=gradient)
        for shape, dtype, varlen, gradient in itertools.product(
            asked["targets"][device]["shapes"], *axes
        )
    )

"""The set of kernels that an image compiles ahead of time: each attention shape, as its calls."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One way to call FlashAttention-4; always causal.

    Attributes:
        head_dim: of q and k.
        head_dim_v: of v.
        heads_per_kv: query heads for one key/value head.
        window: whether it slides; its length enters no kernel.
        softcap: of the logits; 0 without one.
        sinks: whether each head has a learned sink.
        varlen: packed documents (cu_seqlens) instead of a rectangle.
        gradient: forward that keeps what backward needs, and backward; otherwise forward alone.
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
        """Return a name that can be a file's: d128-gqa4-window-varlen-gradient-bfloat16."""
        size = f"d{self.head_dim}"
        if self.head_dim_v != self.head_dim:
            size += f"v{self.head_dim_v}"
        parts = [size, f"gqa{self.heads_per_kv}"]
        parts += ["window"] * self.window + ["sinks"] * self.sinks
        parts += [f"softcap{self.softcap:g}"] if self.softcap else []
        parts += ["varlen" if self.varlen else "dense"]
        return "-".join([*parts, "gradient" if self.gradient else "forward", self.dtype])


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One compute capability.

    Attributes:
        device: as the GPU names itself, "sm_90"; also the folder of its kernels.
        code: what is compiled for it, "sm_90a".
        multiprocessors: of the GPU that is meant; it shapes the grids of some kernels.
        calls: what is compiled for it.
        left_out: shape -> why it is not compiled.
    """

    device: str
    code: str
    multiprocessors: int
    calls: tuple[Call, ...]
    left_out: dict[str, str]

    def calls_of(self, head_dim: int) -> Iterator[Call]:
        """Return the calls of one head_dim."""
        return (call for call in self.calls if call.head_dim == head_dim)


def read_set(path: Path) -> tuple[Target, ...]:
    """Read docker/fa4_cache/IMAGE.json, rendered from the recipe."""
    raw = json.loads(path.read_text())
    return tuple(
        Target(
            device=device,
            code=target["code"],
            multiprocessors=target["multiprocessors"],
            calls=tuple(_calls(target["shapes"], raw)),
            left_out=target["left_out"],
        )
        for device, target in raw["targets"].items()
    )


def _calls(shapes: list[dict[str, Any]], raw: dict[str, Any]) -> Iterator[Call]:
    """Return each shape with packed documents and without, for training and without gradients."""
    for shape, dtype, varlen, gradient in itertools.product(
        shapes, raw["dtypes"], raw["varlen"], raw["gradient"]
    ):
        yield Call(**shape, dtype=dtype, varlen=varlen, gradient=gradient)

"""The set of kernels that is compiled: what a recipe says, spelled out as one call each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One way to call FlashAttention-4.

    Attributes:
        head_dim: of q, k and v alike.
        heads_per_kv: query heads for one key/value head.
        causal: whether a token sees only those before it.
        varlen: packed documents (cu_seqlens) instead of a rectangle.
        gradient: forward that keeps what backward needs, and backward; otherwise forward alone.
    """

    dtype: str
    head_dim: int
    heads_per_kv: int
    causal: bool
    varlen: bool
    gradient: bool

    def __str__(self) -> str:
        """Name it in words of a file name: d128-gqa4-causal-varlen-gradient-bfloat16."""
        parts = [f"d{self.head_dim}", f"gqa{self.heads_per_kv}"]
        parts += ["causal" if self.causal else "full", "varlen" if self.varlen else "dense"]
        return "-".join([*parts, "gradient" if self.gradient else "forward", self.dtype])


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One compute capability.

    Attributes:
        device: as the GPU names itself, "sm_90"; also the folder of its kernels.
        code: what is compiled for it, "sm_90a".
        multiprocessors: of the GPU that is meant; it shapes the grids of some kernels.
        left_out: head_dim -> why it is not compiled.
    """

    device: str
    code: str
    multiprocessors: int
    left_out: dict[int, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSet:
    """What one image has compiled ahead of time."""

    targets: tuple[Target, ...]
    calls: tuple[Call, ...]

    def calls_of(self, target: Target, *, head_dim: int | None = None) -> Iterator[Call]:
        """Give what is compiled for a target, of one head_dim or of all."""
        for call in self.calls:
            if call.head_dim not in target.left_out and head_dim in (None, call.head_dim):
                yield call


def read_set(path: Path) -> KernelSet:
    """Read docker/fa4_cache/IMAGE.json, rendered from the recipe."""
    raw = json.loads(path.read_text())
    targets = tuple(
        Target(
            device=device,
            code=target["code"],
            multiprocessors=target["multiprocessors"],
            left_out={int(head_dim): why for head_dim, why in target["left_out"].items()},
        )
        for device, target in raw["targets"].items()
    )
    axes = ("head_dims", "heads_per_kv", "causal", "varlen", "gradient", "dtypes")
    calls = tuple(
        Call(
            head_dim=head_dim,
            heads_per_kv=ratio,
            causal=causal,
            varlen=varlen,
            gradient=gradient,
            dtype=dtype,
        )
        for head_dim, ratio, causal, varlen, gradient, dtype in itertools.product(
            *(raw[axis] for axis in axes)
        )
    )
    return KernelSet(targets=targets, calls=calls)

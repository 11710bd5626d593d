"""Compare the logits of a merged model with those of the adapter on its base model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

# The number of compared rows, and of tokens in each.
ROWS, TOKENS = 4, 32

# The largest allowed relative difference of a token's logits, for 90 % of the tokens. Both models
# compute in float32. They differ by the order of additions, and by the rounding of the merged
# weights to the dtype in which they are saved: 2**-24, 2**-11 and 2**-8 of a weight.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}

# The same with a base model in 8 bits, which also rounds the inputs of its layers.
TOLERANCE_8BIT = 8e-2

# The share of tokens within the tolerance; in a mixture of experts, rounding can route a few
# tokens to another expert.
_SHARE = 0.9

# `kept` may differ from 1 by this much, and by more where the adapter's effect is small compared
# with the rounding of weights, which can lose small changes. Measured on tiny
# models in bfloat16: 0.997 to 1.004 at an effect of 0.06, 0.93 at 0.012 (2026-11-27).
_KEPT = 0.1

# Smaller effects are the rounding of float32.
_SMALLEST_EFFECT = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsComparison:
    """How the logits of a merged model differ from those of the adapter.

    Attributes:
        difference: relative difference of a token's logits; 90 % of the tokens have at most this.
        tolerance: the largest allowed difference.
        effect: relative difference between the adapter's logits and the base model's.
        kept: the merged model's share of that effect; None where there is no effect.
        tokens: number of compared tokens.
    """

    difference: float
    tolerance: float
    effect: float
    kept: float | None
    tokens: int

    @property
    def agrees(self) -> bool:
        """Return whether the merged model computes what the adapter computes."""
        # Rounding may lose a smaller effect: the user is warned.
        if self.kept is None or self.effect <= self.tolerance / 8:
            return self.difference <= self.tolerance
        kept = abs(self.kept - 1) <= self.kept_tolerance
        return self.difference <= self.tolerance and kept

    @property
    def is_rounded_off(self) -> bool:
        """Return whether the merged weights have lost a tenth of the adapter's effect or more."""
        return self.kept is not None and self.kept < 1 - _KEPT

    @property
    def kept_tolerance(self) -> float:
        """Return how far `kept` may be from 1."""
        return _KEPT * (1 + self.tolerance / self.effect) if self.effect else math.inf


def sample_ids(rows: int) -> torch.Tensor:
    """Return random token ids, int64 (ROWS, TOKENS); one row begins with the last ids.

    Args:
        rows: number of rows of the embeddings.
    """
    ids = torch.randint(0, rows, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    newest = torch.arange(max(0, rows - 8), rows)
    ids[-1, : len(newest)] = newest
    return ids


def compute_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits, float32 (B, S, V) on the CPU; it computes in float32."""
    device = next(model.parameters()).device
    with torch.no_grad(), in_float32(model):
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    found: torch.Tensor = logits.float().cpu()
    return found


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Compute in float32 inside the block, with the weights of one module at a time cast to it."""
    replaced: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def cast(module: Any, _: Any) -> None:
        # PEFT adds the adapter's change to the weights of experts while this module computes.
        below = isinstance(module, ParamWrapper)
        tensors = chain(module.parameters(below), module.buffers(below))
        replaced[module] = [(tensor, tensor.data) for tensor in tensors if _is_rounded(tensor)]
        for tensor, data in replaced[module]:
            tensor.data = data.float()

    def restore(module: Any, *_: Any) -> None:
        for tensor, data in replaced.pop(module, ()):
            tensor.data = data

    modules = list(model.modules())
    handles = [module.register_forward_pre_hook(cast) for module in modules]
    handles += [module.register_forward_hook(restore, always_call=True) for module in modules]
    # 4-bit layers of bitsandbytes have a compute dtype of their own.
    in_4bit = [module for module in modules if hasattr(module, "compute_dtype")]
    before = [module.compute_dtype for module in in_4bit]
    for module in in_4bit:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, dtype in zip(in_4bit, before, strict=True):
            module.compute_dtype = dtype


def _is_rounded(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def compare_logits(
    merged: torch.Tensor, *, adapter: torch.Tensor, base: torch.Tensor, tolerance: float
) -> LogitsComparison:
    """Compare logits, each float32 (B, S, V); a constant added to all logits of a token is ignored.

    Args:
        merged: logits of the merged model.
        adapter: logits of the base model with the adapter.
        base: logits of the base model alone.
        tolerance: the largest allowed difference.
    """
    merged, adapter, base = (x - x.mean(-1, keepdim=True) for x in (merged, adapter, base))
    relative = (merged - adapter).norm(dim=-1) / adapter.norm(dim=-1)
    trained = adapter - base
    size = trained.square().sum()
    effect = float(size.sqrt() / adapter.norm())
    kept = None
    if effect > _SMALLEST_EFFECT:
        kept = float(((merged - base) * trained).sum() / size)
    difference = float(relative.nan_to_num(torch.inf).flatten().quantile(_SHARE))
    return LogitsComparison(
        difference=difference, tolerance=tolerance, effect=effect, kept=kept,
        tokens=relative.numel(),
    )  # fmt: skip

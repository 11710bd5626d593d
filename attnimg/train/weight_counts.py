"""Count the weights of a model, and those that a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCounts:
    """Numbers of weights; tied ones count once, packed 4-bit ones by their unpacked number."""

    trained: int
    all: int


def count_weights(model: Any) -> WeightCounts:
    """Count a model's weights, without the frozen copies of PEFT's modules_to_save."""
    counts = [
        (_count(weight), weight.requires_grad)
        for name, weight in model.named_parameters()
        if ".original_module." not in name
    ]
    return WeightCounts(
        trained=sum(count for count, trained in counts if trained),
        all=sum(count for count, _ in counts),
    )


def _count(weight: Any) -> int:
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of a weight.
    count = int(weight.numel() or getattr(weight, "ds_numel", 0))
    if type(weight).__name__ == "Params4bit":
        return count * 2 * int(weight.element_size())
    return count


def sentence(counts: WeightCounts) -> str:
    """Return the line that a run prints before its first step."""
    share = counts.trained / max(counts.all, 1)
    return f"weights: trains {counts.trained:,} of {counts.all:,} ({share:.2%})"

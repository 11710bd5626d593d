"""Compute the learning rate schedules of axolotl that transformers does not have.

Source: axolotl 0.19.0, core/trainers/mixins/scheduler.py and utils/schedulers.py (2026-11-27).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from attnimg.config.schema import Config

# The factor of learning_rate at a step.
Factor = Callable[[int], float]


def cosine_factor(config: Config, *, warmup: int, total: int) -> Factor | None:
    """Return the cosine with a constant end or a quadratic warmup; None if neither is set.

    Args:
        config: the validated run.
        warmup: steps until the highest learning rate.
        total: optimizer steps of the run.
    """
    if config.lr_quadratic_warmup:
        return partial(_quadratic_warmup, warmup=warmup, total=total)
    if config.cosine_constant_lr_ratio:
        low = config.cosine_min_lr_ratio or 0.0
        end = int(total * config.cosine_constant_lr_ratio)
        return partial(_constant_end, warmup=warmup, end=end, low=low)
    return None


def _quadratic_warmup(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return (step / warmup) ** 2
    return _half_cosine((step - warmup) / max(1, total - warmup))


def _constant_end(step: int, *, warmup: int, end: int, low: float) -> float:
    """Return the factor of a cosine that ends at step `end`, and is `low` from there on."""
    if step < warmup:
        return step / warmup
    if step >= end:
        return low
    return low + (1 - low) * _half_cosine((step - warmup) / (end - warmup))


def _half_cosine(progress: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))

"""Compute learning rates as axolotl does: its own schedules, and separate rates of some weights.

Source: axolotl 0.19.0, core/trainers/mixins/scheduler.py and optimizer.py, utils/schedulers.py
(2026-11-27).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, bad_value

# The factor of learning_rate at a step.
Factor = Callable[[int], float]


def cosine_factor(config: Config, *, warmup: int, total: int) -> Factor | None:
    """Return the cosine schedule with a constant end or quadratic warmup; None if neither is set.

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


def create_optimizer_with_rates(
    model: Any, config: Config, optimizer_class: Any, options: dict[str, Any], *, decay: set[str]
) -> Any:
    """Return an optimizer with a rate of its own for some weights; None if none is set.

    They are embeddings, LoRA's B, or the groups of lr_groups.

    Args:
        model: the model to train.
        config: the validated run.
        optimizer_class: creates the optimizer.
        options: its arguments, with learning_rate as lr.
        decay: names of the weights with weight decay.

    Raises:
        AttnimgError: no weight has such a rate (bad-value).
    """
    if config.loraplus_lr_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        if config.loraplus_lr_embedding is not None:
            options = {**options, "loraplus_lr_embedding": config.loraplus_lr_embedding}
        return create_loraplus_optimizer(
            model, optimizer_class, loraplus_lr_ratio=config.loraplus_lr_ratio, **options
        )
    key = "embedding_lr" if config.embedding_lr else "embedding_lr_scale"
    if getattr(config, key) is None and not config.lr_groups:
        return None
    rate = config.embedding_lr or options["lr"] * (config.embedding_lr_scale or 1)
    groups: dict[str, list[Any]] = {"embeddings": [], "decay": [], "others": []}
    named: dict[str, list[Any]] = {group.name: [] for group in config.lr_groups or ()}
    modules = {part: group.name for group in config.lr_groups or () for part in group.modules}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        if _is_embedding(name):
            groups["embeddings"].append(weight)
        elif name not in decay:
            groups["others"].append(weight)
        elif (found := next((part for part in modules if part in name), None)) is not None:
            named[modules[found]].append(weight)
        else:
            groups["decay"].append(weight)
    if getattr(config, key) is not None and not groups["embeddings"]:
        raise bad_value(
            key,
            f"{key} has no effect: no embedding is trained",
            why="found no trained weight of an embed_tokens or lm_head",
            do=f"remove {key}",
        )
    if empty := [name for name, weights in named.items() if not weights]:
        raise _empty_group(empty[0], config, model, decay=decay)
    decayed, without = {"weight_decay": config.weight_decay}, {"weight_decay": 0.0}
    return optimizer_class(
        [
            {"params": groups["decay"], "lr": options["lr"], **decayed},
            {"params": groups["embeddings"], "lr": rate, **without},
            {"params": groups["others"], "lr": options["lr"], **without},
            *({"params": named[group.name], "lr": group.lr, **decayed}
              for group in config.lr_groups or ()),
        ],
        **options,
    )  # fmt: skip


def _empty_group(name: str, config: Config, model: Any, *, decay: set[str]) -> AttnimgError:
    """Build the error for a group of lr_groups without weights."""
    group = next(group for group in config.lr_groups or () if group.name == name)
    trained = [n for n, weight in model.named_parameters() if weight.requires_grad and n in decay
               and not _is_embedding(n)]  # fmt: skip
    examples = ", ".join(dict.fromkeys((trained[0], trained[-1]))) if trained else "none"
    return bad_value(
        "lr_groups",
        f"lr_groups: {name} has no effect: it names no weight of its own",
        why=f"found modules: {', '.join(group.modules)}; needed parts of names of trained weights "
        f"with weight decay, which are no embeddings and in no earlier group, such as {examples}",
        do=f"correct modules of {name} in lr_groups, or remove {name} from it",
    )


def _is_embedding(name: str) -> bool:
    """Return whether axolotl counts a weight as one of an embedding, by its name."""
    of_copy = name.endswith("modules_to_save.default.weight")
    return of_copy or "embed_tokens" in name or "lm_head" in name

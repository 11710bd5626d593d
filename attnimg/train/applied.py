"""Read back from a trainer what it really uses, for the receipt.

A config says what was asked for. A checkpoint restores an optimizer and a schedule, and libraries
replace names and dtypes; the values here are those that the next step is computed with.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from attnimg.facts import Plan


def applied(engine: Any, plan: Plan) -> dict[str, object]:
    """Return what a trainer uses, when it is ready for its next step.

    Args:
        engine: after it restored the checkpoint, if there is one.
        plan: for the backends that a router calls.
    """
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    arguments, accelerator = engine.args, engine.accelerator
    return {
        "step": engine.state.global_step,
        "max_steps": engine.state.max_steps,
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "groups": [_group(group) for group in optimizer.param_groups],
        "scheduler": {
            "class": type(scheduler).__name__,
            "last_epoch": getattr(scheduler, "last_epoch", None),
            "base_lrs": [_number(rate) for rate in getattr(scheduler, "base_lrs", ())],
        },
        "max_grad_norm": arguments.max_grad_norm,
        "micro_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "seed": arguments.seed,
        "dtypes": {
            "trained": _dtypes(engine.model, trained=True),
            "frozen": _dtypes(engine.model, trained=False),
        },
        "attention": {
            "modules": _attention(engine.model),
            "backends": [
                {"layers": choice.layers, "backend": choice.verdict.backend.name}
                for choice in plan.groups
            ],
        },
    }


def _group(group: dict[str, Any]) -> dict[str, object]:
    """Return the values of a group of the optimizer, and the number of its tensors."""
    values = {name: _number(value) for name, value in group.items() if name != "params"}
    return {"tensors": len(group["params"]), **values}


def _number(value: Any) -> Any:
    """Return a value; torchao's optimizers keep their rate in a tensor."""
    return value.item() if hasattr(value, "item") else value


def _dtypes(model: Any, *, trained: bool) -> dict[str, int]:
    """Return how many weights have each dtype, of those that learn or of the others."""
    found: Counter[str] = Counter()
    for weight in model.parameters():
        if weight.requires_grad is trained:
            found[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    return dict(found)


def _attention(model: Any) -> list[dict[str, object]]:
    """Return each kind of attention module with the implementation that it calls, and its count."""
    found: Counter[tuple[str, int | None, str]] = Counter()
    for module in model.modules():
        name = type(module).__name__
        called = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if "Attention" in name and called is not None:
            found[name, getattr(module, "sliding_window", None), str(called)] += 1
    return [
        {"class": name, "window": window, "implementation": called, "count": count}
        for (name, window, called), count in found.items()
    ]

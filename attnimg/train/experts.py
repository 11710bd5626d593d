"""Choose how a model computes its experts, and load their fused weights in 4 bits."""

from __future__ import annotations

from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import bad_value

# The implementations of transformers.
# Source: transformers 5.22.2, modeling_utils.py, get_correct_experts_implementation (2026-11-27).
IMPLEMENTATIONS = frozenset({"eager", "batched_mm", "grouped_mm"})


def experts_implementation(config: Config) -> str | None:
    """Return the implementation to load the model with; None for transformers' choice."""
    name = config.experts_implementation
    return name if name in IMPLEMENTATIONS else None


def require_experts(model: Any, config: Config) -> None:
    """Raise if the config chooses how experts are computed, and the model has none to choose for.

    Args:
        model: a transformers model, also one without weights.
        config: the validated run.

    Raises:
        AttnimgError: code bad-value.
    """
    name = experts_implementation(config)
    if name is None or experts_in_use(model):
        return
    raise bad_value(
        "experts_implementation",
        f"experts_implementation: {name} has no effect on this model",
        why=f"found no experts in {type(model).__name__} that transformers computes by it",
        do="remove experts_implementation",
    )


def experts_in_use(model: Any) -> str | None:
    """Return the implementation of a model's experts; None where it can't be chosen."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            return str(module.config._experts_implementation)
    return None

"""Move activations to CPU memory until the backward pass, with TRL's offloader."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from attnimg.config.schema import Config, offloading_mode
from attnimg.facts import Machine


def offload_activations(
    model: Any, config: Config, machine: Machine
) -> AbstractContextManager[object]:
    """Return a context for a training step that keeps activations in CPU memory.

    Layers are checkpointed, so these are the inputs of each layer. axolotl does the same, except
    under an adapter: there it moves all activations and recomputes nothing.
    Source: axolotl 0.19.0, loaders/model.py, _apply_activation_checkpointing (2026-11-27).
    """
    mode = offloading_mode(config)
    if mode is None or machine.arch.vendor == "cpu":
        return nullcontext()
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    context: AbstractContextManager[object] = get_act_offloading_ctx_manager(
        model, use_streams=mode != "legacy", warn_if_no_head=False
    )
    return context

"""Load the reference model of dpo and kto: a frozen copy of the model before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config, has_reference
from attnimg.run_facts import RunContext
from attnimg.train.model import load_model

if TYPE_CHECKING:
    import torch


def needs_reference(config: Config) -> bool:
    """Return whether a run needs a second model in memory.

    With an adapter, the model is its own reference: without the adapter, or with a copy of it.
    Source: axolotl 0.19.0, train.py, setup_reference_model (2026-11-27)
    """
    return has_reference(config) and not config.adapter


def load_reference(
    config: Config,
    model: torch.nn.Module,
    *,
    tokenizer: Any,
    implementation: str,
    context: RunContext,
    needs_dtype_cast: bool,
    replace_layers: Callable[[Any], None] | None = None,
) -> Any:
    """Return a frozen copy of a model before training, with the same attention.

    It is loaded from its files, since patched layers of the first model may refer to that model.

    Args:
        config: the validated run.
        model: the model to train, as `load_model` returned it.
        tokenizer: as `load_tokenizer` returns it.
        implementation: transformers' name of the selected attention.
        context: how the run calls the model.
        needs_dtype_cast: whether the backend takes q, k, v in that precision only.
        replace_layers: replaces the same layers as in the model to train.
    """
    reference = load_model(
        config,
        tokenizer=tokenizer,
        implementation=implementation,
        context=context,
        needs_dtype_cast=needs_dtype_cast,
        replace_layers=replace_layers,
    )
    # New embeddings are random, so both models must have the same.
    reference.load_state_dict(model.state_dict())
    reference.requires_grad_(False)
    return reference.eval()

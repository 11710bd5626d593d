"""Which attention transformers' model classes take, told by the classes themselves."""

from __future__ import annotations

from typing import Any

from attnimg.facts import ModelClass

# Where a model class says whether it takes a kind of attention.
# Source: transformers 5.22.2, modeling_utils.py, class PreTrainedModel.
_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash": "_supports_flash_attn",
    "flex": "_supports_flex_attn",
}


def class_of(config: Any) -> type[Any] | None:
    """Give the causal language model class of a transformers config, None when there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def facts_of(model_class: type[Any]) -> ModelClass | None:
    """Read off a PreTrainedModel class what it does not take; None when it takes everything."""
    lacks = {kind for kind, flag in _FLAGS.items() if not getattr(model_class, flag, True)}
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        lacks.add("others")
    flash_names = tuple(getattr(model_class, "_compatible_flash_implementations", None) or ())
    if not lacks and not flash_names:
        return None
    return ModelClass(name=model_class.__name__, lacks=frozenset(lacks), flash_names=flash_names)

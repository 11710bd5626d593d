"""Which of transformers' model classes take a backend, told before any weights are read."""

from __future__ import annotations

from typing import Any

from attnimg.facts import Backend, Reason

# Where a model class says whether it takes a kind of attention.
# Source: transformers 5.22.2, modeling_utils.py, class PreTrainedModel.
_FLAGS = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
_FLASH = "_supports_flash_attn"


def reason_against_class(model_class: type[Any], backend: Backend) -> Reason | None:
    """Say why a transformers model class cannot run a backend, before any weights are read.

    Args:
        model_class: a PreTrainedModel class.
        backend: what the plan chose.
    """
    name = backend.applied_as or backend.name
    if name.startswith("attnimg_"):
        return _against_own(model_class, backend)
    flag = _FLASH if backend.uses_flash_lib or backend.family else _FLAGS.get(name)
    if flag is not None and not getattr(model_class, flag, True):
        text = f"transformers' {model_class.__name__} says that it has no {backend.summary}"
        return Reason(code="model-class", text=text)
    compatible = getattr(model_class, "_compatible_flash_implementations", None)
    # transformers replaces any other name with "flash" in it by the first of that list.
    if compatible and "flash" in name and name not in compatible:
        takes = ", ".join(compatible)
        text = f"transformers' {model_class.__name__} takes {takes} and would swap {name} for it"
        return Reason(code="model-class", text=text)
    return None


def _against_own(model_class: type[Any], backend: Backend) -> Reason | None:
    """Refuse classes that a function of attnimg's own would not serve.

    transformers takes a registered name for classes with attention code of their own all the same:
    bloom then runs eager without a word, falcon raises KeyError. And it asks no flag of the class:
    a function that gets the padding and no mask, as flash kernels do, would drop the chunks of
    llama4. Seen with transformers 5.22.2 (2026-11-21).
    """
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if can_set is None or can_set():
        if getattr(model_class, _FLASH, True):
            return None
        text = (
            f"transformers' {model_class.__name__} says that it has no flash attention: its mask "
            f"says more than {backend.name} is told"
        )
        return Reason(code="model-class", text=text)
    text = (
        f"transformers' {model_class.__name__} has attention code of its own, where "
        f"{backend.name} can't be put"
    )
    return Reason(code="model-class", text=text)


def class_of(config: Any) -> type[Any] | None:
    """Give the causal language model class of a transformers config, None when there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None

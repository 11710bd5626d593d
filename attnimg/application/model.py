"""Read and change the attention implementation of a model."""

from __future__ import annotations

from typing import Any

from attnimg.application.registry import load_and_register
from attnimg.backends import hub_repo_name
from attnimg.backends._transformers import DIRECT
from attnimg.errors import AttnimgError
from attnimg.facts import Backend
from attnimg.run_facts import LayerGroup, ModelClass

# Kind of attention -> the attribute of a model class that declares its support.
# Source: transformers 5.22.2, modeling_utils.py, class PreTrainedModel.
_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash": "_supports_flash_attn",
    "flex": "_supports_flex_attn",
}


def find_model_class(config: Any) -> type[Any] | None:
    """Return the class of causal language models for a transformers config; None without one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None


def read_class_limits(model_class: type[Any]) -> ModelClass | None:
    """Return the limits of a PreTrainedModel class; None when it supports every backend."""
    lacks = {kind for kind, flag in _FLAGS.items() if not getattr(model_class, flag, True)}
    can_set = getattr(model_class, "_can_set_attn_implementation", None)
    if can_set is not None and not can_set():
        lacks.add("others")
    flash_names = tuple(getattr(model_class, "_compatible_flash_implementations", None) or ())
    if not lacks and not flash_names:
        return None
    return ModelClass(name=model_class.__name__, lacks=frozenset(lacks), flash_names=flash_names)


def inner_model(model: Any) -> Any:
    """Return the model inside PEFT's wrapper; an unwrapped model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def current_implementation(model: Any) -> str:
    """Return the attention implementation of a loaded model, as transformers names it."""
    return str(model.config._attn_implementation)


def require_applied(model: Any, backend: Backend) -> None:
    """Raise if a model runs another attention implementation than the plan's backend.

    transformers may silently load a hub kernel instead, or replace a name by another.

    Raises:
        AttnimgError: the model's implementation is not the backend's.
    """
    found = current_implementation(model)
    if found == backend.applied_as or hub_repo_name(found) == backend.hub_repo:
        return
    if backend.unpadded_v and found.startswith(DIRECT):
        return
    raise AttnimgError(
        f"{backend.name} was not applied",
        why=f"found {found} in the model, needed {backend.applied_as}; transformers replaced it",
        do="set attn_implementation to a backend that fits; `attnimg explain` lists them",
        code="not-applied",
        key="attn_implementation",
        exit_code=1,
    )


def switch_backend(
    model: Any, backend: Backend, *, layers: tuple[LayerGroup, ...] = (), trusted: bool = False
) -> None:
    """Change the attention of a loaded model, and check that it changed.

    Args:
        model: a transformers model, which PEFT may have wrapped.
        backend: the new backend.
        layers: the model's attention layers.
        trusted: whether hub kernels of untrusted publishers may run (trust_remote_code).

    Raises:
        AttnimgError: the model does not support the backend.
    """
    try:
        model.set_attn_implementation(load_and_register(backend, layers=layers, trusted=trusted))
    except (ValueError, ImportError, KeyError) as error:
        raise AttnimgError(
            f"{backend.name} could not be applied",
            why=str(error),
            do="set attn_implementation: eager, which every model supports",
            code="not-applied",
            key="attn_implementation",
            exit_code=1,
        ) from error
    require_applied(model, backend)

"""Find the fields of a model's configuration that its class never reads.

Some of them only decide other fields, such as max_window_layers, which decides layer_types; others
are left over from earlier versions, such as Llama's pretraining_tp.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from attnimg.application import find_model_class

# Modules of transformers that read fields of every model's configuration.
_SHARED = (
    "modeling_utils", "modeling_rope_utils", "modeling_layers", "masking_utils", "initialization",
    "loss.loss_utils", "integrations.moe", "utils.generic",
)  # fmt: skip


def unread_fields(model_config: Any, names: list[str]) -> list[str]:
    """Return the names that do not occur in the code of the model's class.

    None where transformers does not have that code.
    """
    model_class = find_model_class(model_config)
    if model_class is None or not model_class.__module__.startswith("transformers."):
        return []
    words = _words(model_class.__module__).union(*(_words(f"transformers.{m}") for m in _SHARED))
    aliases = model_config.attribute_map.items()
    return [
        name
        for name in names
        if not words & {name, *(alias for alias, field in aliases if field == name)}
    ]


def derived_values(model_config: Any) -> dict[str, Any]:
    """Return the fields of a configuration, and the properties that its own class computes."""
    from transformers import PreTrainedConfig

    kind = type(model_config)
    own = set(dir(kind)) - set(dir(PreTrainedConfig))
    names = [name for name in own if isinstance(getattr(kind, name, None), property)]
    found = {name: repr(getattr(model_config, name, None)) for name in names}
    return {**found, **model_config.to_dict()}


def has_effect(kind: Any, fields: Mapping[str, Any], name: str) -> bool:
    """Return whether a configuration without one of the fields differs in another one."""
    from huggingface_hub.errors import StrictDataclassError

    others = {key: value for key, value in fields.items() if key != name}
    with_it = derived_values(kind.from_dict(dict(fields)))
    try:
        without = derived_values(kind.from_dict(others))
    except (StrictDataclassError, ValueError):  # the others need it
        return True
    return any(with_it[key] != without.get(key) for key in with_it if key != name)


@cache
def _words(module: str) -> frozenset[str]:
    """Return the words in the source of a module."""
    found = sys.modules.get(module) or importlib.import_module(module)
    return frozenset(re.findall(r"\w+", inspect.getsource(found)))

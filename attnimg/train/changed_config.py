"""Change the fields of a model's configuration as the key model_config says, before loading.

Source: axolotl 0.19.0, loaders/utils.py, load_model_config: setattr of each field (2026-11-27).
There, a field that follows from changed ones keeps its value; here the config must name it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

from attnimg.application import find_model_class
from attnimg.errors import AttnimgError, bad_value

KEY = "model_config"

# Modules of transformers that read fields of every model's configuration.
_SHARED = (
    "modeling_utils", "modeling_rope_utils", "modeling_layers", "masking_utils", "initialization",
    "loss.loss_utils", "integrations.moe", "utils.generic",
)  # fmt: skip


def change_fields(
    model_config: Any, changes: Mapping[str, Any] | None, *, stored: Mapping[str, Any]
) -> None:
    """Set fields of a transformers configuration.

    Args:
        model_config: the configuration; changed in place.
        changes: field -> value.
        stored: the model's config.json.

    Raises:
        AttnimgError: the configuration has no such field, does not accept the value, would not
            use it, or has fields that follow from it and keep their values (bad-value).
    """
    named = {}
    for name, value in (changes or {}).items():
        _require_field(model_config, name, value, stored)
        if name in ("rope_scaling", "rope_parameters"):
            name, value = "rope_parameters", _rope_parameters(model_config, value)
        named[model_config.attribute_map.get(name, name)] = value
    _require_effect(model_config, named, stored)
    for name, value in named.items():
        with _refused_values(name):
            setattr(model_config, name, value)


def _require_field(model_config: Any, name: str, value: object, stored: Mapping[str, Any]) -> None:
    """Raise unless the configuration has a field of this name that the model's class may read."""
    from transformers import PreTrainedConfig

    if name in model_config.sub_configs or name == "model_type":
        raise _refused_field(name, "it names another class of configuration")
    if name == "rope_theta" and hasattr(model_config, "rope_parameters"):
        why = "transformers reads it in rope_parameters, and here it would have no effect"
        do = f"write rope_parameters: {{{name}: {value}}} in place of {name} in {KEY}"
        raise _refused_field(name, why, do=do)
    fields = set(inspect.signature(type(model_config)).parameters)
    known = fields | set(stored) | set(model_config.attribute_map) | {"rope_scaling"}
    known -= set(inspect.signature(PreTrainedConfig).parameters)
    known = {field for field in known if not field.startswith("_")}
    if name not in known or not hasattr(model_config, name):
        raise _unknown_field(model_config, name, sorted(known))


def _require_effect(
    model_config: Any, changes: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Raise unless a configuration that is built with the changes has them, and only them.

    Fields with None as their default follow from others, such as layer_types from sliding_window;
    config.json may have them as they followed from the earlier values.
    """
    kind = type(model_config)
    parameters = inspect.signature(kind).parameters
    given = {name: value for name, value in stored.items() if _is_kept(parameters, name)}
    with _refused_values(", ".join(changes)):
        before = kind.from_dict(dict(given)).to_dict()
        after = kind.from_dict({**given, **changes}).to_dict()
    current = model_config.to_dict()
    follows = {
        name: after[name]
        for name in after
        if name not in changes
        and after[name] != before.get(name)
        and before.get(name) == current.get(name)
    }
    if follows:
        name = next(iter(follows))
        why = f"a new {kind.__name__} derives {name} from it, but the model keeps {current[name]}"
        text = ", ".join(f"{field}: {json.dumps(value)}" for field, value in follows.items())
        do = f"add {text} to {KEY}" if follows.keys() <= parameters.keys() else ""
        raise _refused_field(", ".join(changes), why, do=do)
    for name, value in changes.items():
        if not _has_value(after.get(name), value):
            why = f"it would have no effect: {kind.__name__} then has {after.get(name)}"
            raise _refused_field(name, why)
    deciding = {name: value for name, value in changes.items() if _is_kept(parameters, name)}
    new = [name for name, value in deciding.items() if current.get(name) != value]
    for name in _unread_fields(model_config, new):
        if not _has_effect(kind, {**given, **deciding}, name):
            why = f"it would have no effect: {kind.__name__}'s model does not read it"
            raise _refused_field(name, why)


def _unread_fields(model_config: Any, names: list[str]) -> list[str]:
    """Return the names that do not occur in the code of the model's class.

    Some fields only decide other ones, such as max_window_layers, which decides layer_types; others
    are left over from earlier versions, such as Llama's pretraining_tp. None where transformers
    does not have that code.
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


def _derived_values(model_config: Any) -> dict[str, Any]:
    """Return the fields of a configuration, and the properties that its own class computes."""
    from transformers import PreTrainedConfig

    kind = type(model_config)
    own = set(dir(kind)) - set(dir(PreTrainedConfig))
    names = [name for name in own if isinstance(getattr(kind, name, None), property)]
    found = {name: repr(getattr(model_config, name, None)) for name in names}
    return {**found, **model_config.to_dict()}


def _has_effect(kind: Any, fields: Mapping[str, Any], name: str) -> bool:
    """Return whether a configuration without one of the fields differs in another one."""
    from huggingface_hub.errors import StrictDataclassError

    others = {key: value for key, value in fields.items() if key != name}
    with_it = _derived_values(kind.from_dict(dict(fields)))
    try:
        without = _derived_values(kind.from_dict(others))
    except (StrictDataclassError, ValueError):  # the others need it
        return True
    return any(with_it[key] != without.get(key) for key in with_it if key != name)


@cache
def _words(module: str) -> frozenset[str]:
    """Return the words in the source of a module."""
    found = sys.modules.get(module) or importlib.import_module(module)
    return frozenset(re.findall(r"\w+", inspect.getsource(found)))


def _is_kept(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Return whether a field does not follow from others, by its default."""
    known = parameters.get(name)
    return name == "rope_parameters" or known is None or known.default is not None


def _has_value(found: object, wanted: object) -> bool:
    """Return whether a field has a value; mappings may have further items."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return all(name in found and _has_value(found[name], wanted[name]) for name in wanted)
    return found == wanted


@contextmanager
def _refused_values(name: str) -> Iterator[None]:
    """Turn an error on a value into an AttnimgError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, TypeError, ValueError, AttributeError, LookupError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _refused_field(name, lines[-1] if lines else type(error).__name__) from error


def require_tied(model: Any, changes: Mapping[str, Any] | None) -> None:
    """Raise unless a loaded model ties its embeddings as model_config says.

    transformers does not tie two weights that are both in the files.
    Source: transformers 5.22.2, modeling_utils.py, tie_weights (2026-11-27).

    Raises:
        AttnimgError: code bad-value.
    """
    name = "tie_word_embeddings"
    output = model.get_output_embeddings()
    if name not in (changes or {}) or output is None:
        return
    tied = output.weight is model.get_input_embeddings().weight
    if tied != (changes or {})[name]:
        found = "one weight" if tied else "two weights, which are both in the model's files"
        raise _refused_field(name, f"the input and the output embeddings are {found}")


def unfit_fields(changes: Mapping[str, Any], why: str) -> AttnimgError:
    """Return the error for changes with which the model's weights can't be loaded."""
    sizes = [name for name, value in changes.items() if isinstance(value, int)] or list(changes)
    fields = ", ".join(sizes)
    what = f"the model can't be loaded with {KEY}"
    return bad_value(KEY, what, why=why, do=f"correct or remove {fields} in {KEY}")


def _rope_parameters(model_config: Any, value: Any) -> Any:
    """Return the settings of RoPE in transformers' form.

    The configuration's own rope_theta is kept where the new settings have none, and `type` is the
    earlier name of rope_type.
    """
    if not isinstance(value, Mapping) or any(isinstance(v, Mapping) for v in value.values()):
        return value
    settings = {"rope_type" if key == "type" else key: item for key, item in value.items()}
    before = getattr(model_config, "rope_parameters", None) or {}
    theta = before.get("rope_theta", getattr(model_config, "rope_theta", None))
    return settings if theta is None else {"rope_theta": theta, **settings}


def _unknown_field(model_config: Any, name: str, known: list[str]) -> AttnimgError:
    similar = get_close_matches(name, known, n=3, cutoff=0.6)
    text = ", ".join(similar) if similar else ", ".join(known[:8]) + " ..."
    why = f"{type(model_config).__name__} has no such field, and it would have no effect; it has "
    return _refused_field(name, why + text)


def _refused_field(name: str, why: str, *, do: str = "") -> AttnimgError:
    do = do or f"correct or remove {name} in {KEY}"
    return bad_value(KEY, f"{KEY} can't set {name}", why=why, do=do)

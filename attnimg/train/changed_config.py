"""Change the fields of a model's configuration as the key model_config says, before loading.

Source: axolotl 0.19.0, loaders/utils.py, load_model_config: setattr of each field (2026-11-27).
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from attnimg.errors import AttnimgError, bad_value

KEY = "model_config"


def change_fields(model_config: Any, changes: Mapping[str, Any] | None) -> None:
    """Set fields of a transformers configuration.

    Args:
        model_config: the configuration; changed in place.
        changes: field -> value.

    Raises:
        AttnimgError: the configuration has no such field, or does not accept the value (bad-value).
    """
    from huggingface_hub.errors import StrictDataclassError

    for name, value in (changes or {}).items():
        if name in model_config.sub_configs or name == "model_type":
            raise _refused_field(name, "it names another class of configuration")
        if not hasattr(model_config, name):
            raise _unknown_field(model_config, name)
        if name in ("rope_scaling", "rope_parameters"):
            name, value = "rope_parameters", _rope_parameters(model_config, value)
        try:
            setattr(model_config, name, value)
        except (StrictDataclassError, TypeError, ValueError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise _refused_field(name, lines[-1] if lines else "") from error


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


def _unknown_field(model_config: Any, name: str) -> AttnimgError:
    known = sorted({*model_config.to_dict(), *(model_config.attribute_map or {})})
    similar = get_close_matches(name, known, n=3, cutoff=0.6)
    text = ", ".join(similar) if similar else ", ".join(known[:8]) + " ..."
    why = f"{type(model_config).__name__} has no such field, and it would have no effect; it has "
    return _refused_field(name, why + text)


def _refused_field(name: str, why: str) -> AttnimgError:
    do = f"correct or remove {name} in {KEY}"
    return bad_value(KEY, f"{KEY} can't set {name}", why=why, do=do)

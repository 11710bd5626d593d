"""Replace other names of keys, and the key that another one is computed from, as axolotl does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attnimg.config.schema import Config, make_error, make_warning
from attnimg.facts import Finding

# Other name -> key.
# Source: axolotl 0.19.0, utils/schemas/deprecated.py, RemappedParameters;
# utils/schemas/validation.py, check_eval_strategy and check_neftune; core/builders/base.py,
# _configure_precision_settings (2026-11-27)
OTHER_NAMES = {
    "adam_eps": "adam_epsilon",
    "bfloat16": "bf16",
    "evaluation_strategy": "eval_strategy",
    "gc_steps": "gc_collect_steps",
    "model_config": "overrides_of_model_config",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "type_of_model": "model_type",
}


def replace_other_names(
    values: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, str], list[Finding]]:
    """Replace other names of keys in the values of a config, before they are checked.

    Args:
        values: the keys that are set, with their values.

    Returns:
        The values; key -> the other name that the config has in its place; errors and warnings.
    """
    result, written, found = dict(values), {}, []
    for name, key in OTHER_NAMES.items():
        if name not in result:
            continue
        value = result.pop(name)
        if name == "bfloat16" and value is False:
            continue
        if name == "adam_eps":
            what = f"{name} sets {key} here; axolotl 0.19 does not read it"
            do = f"use {key}, or remove {name}"
            found.append(make_warning("done-otherwise", name, what, do))
        if result.get(key) == "auto" and name == "bfloat16":
            del result[key]
        if key not in result:
            result[key], written[key] = value, name
        elif result[key] != value and (name, value, result[key]) != ("bfloat16", True, "full"):
            why = f"found both, with different values; {name} is another name of {key}"
            what = f"{name} contradicts {key}"
            found.append(make_error("bad-value", name, what, why, f"keep {key} or {name}"))
    return result, written, found


def with_written_name(error: Finding, written: Mapping[str, str]) -> Finding:
    """Return an error with the name of its key that the config has; see replace_other_names."""
    if (name := written.get(error.key or "")) is None:
        return error
    key = re.compile(rf"\b{error.key}\b")
    texts = {field: key.sub(name, getattr(error, field)) for field in ("what", "why", "do")}
    return replace(error, key=name, **texts)


def replace_batch_size(config: Config) -> tuple[Config, list[Finding]]:
    """Set gradient_accumulation_steps from batch_size; return an error or a warning on it.

    axolotl applies the default of gradient_accumulation_steps before it reads batch_size, so that
    batch_size has no effect, contrary to its documentation.
    Source: axolotl 0.19.0, utils/config/__init__.py, normalize_config, and
    utils/schemas/training.py (2026-11-27).
    """
    key, steps, rows = "batch_size", "gradient_accumulation_steps", config.micro_batch_size
    update: dict[str, Any] = {key: None}
    if config.batch_size is None:
        return config, []
    if steps in config.model_fields_set:
        why = "found both, which set the same thing; needed one of them"
        what, do = f"{key} contradicts {steps}", f"keep {steps} or {key}"
        found = make_error("bad-value", key, what, why, do)
    elif config.batch_size % rows:
        why = f"found {key}: {config.batch_size} and micro_batch_size: {rows}"
        what = f"{key} is not a multiple of micro_batch_size"
        nearest = max(rows, config.batch_size // rows * rows)
        found = make_error("bad-value", key, what, why, f"set {key}: {nearest}")
    else:
        update[steps] = config.batch_size // rows
        what = f"{key}: {config.batch_size} sets {steps}: {update[steps]} here; in axolotl 0.19 it "
        what += "has no effect, contrary to its documentation"
        found = make_warning("done-otherwise", key, what, f"replace it by {steps}: {update[steps]}")
    return config.model_copy(update=update), [found]

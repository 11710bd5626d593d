"""Replace keys that are another name for a key, or that it is computed from, as axolotl does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnimg.config.schema import Config, make_error, make_warning
from attnimg.facts import Finding

# Other name -> key. Source: axolotl 0.19.0, utils/schemas/validation.py, check_eval_strategy and
# check_neftune; core/builders/base.py, _configure_precision_settings (2026-11-27)
OTHER_NAMES = {
    "adam_eps": "adam_epsilon",
    "bfloat16": "bf16",
    "evaluation_strategy": "eval_strategy",
    "gc_steps": "gc_collect_steps",
    "noisy_embedding_alpha": "neftune_noise_alpha",
}
# The first of these has no effect in axolotl 0.19, which does not read it.
_UNREAD = frozenset({"adam_eps"})


def replace_other_names(config: Config) -> tuple[Config, list[Finding]]:
    """Return the config without other names, with the errors and warnings on them."""
    found: list[Finding] = []
    update: dict[str, Any] = {"batch_size": None}
    for name, key in OTHER_NAMES.items():
        value, other = getattr(config, name), getattr(config, key)
        update[name] = None
        if value is None or value is False:
            continue
        if key in config.model_fields_set and other not in (None, value, "auto", "full"):
            why = f"found both, with the values {value} and {other}, for the same setting"
            what = f"{name} contradicts {key}"
            found.append(make_error("bad-value", name, what, why, f"keep {key} or {name}"))
        elif other != "full":
            update[key] = value
        if name in _UNREAD:
            what = f"{name} sets {key} here; axolotl 0.19 does not read it"
            do = f"use {key}, or remove {name}"
            found.append(make_warning("done-otherwise", name, what, do))
    found += _accumulation(config, update)
    return config.model_copy(update=update), found


def _accumulation(config: Config, update: dict[str, Any]) -> Iterator[Finding]:
    """Add gradient_accumulation_steps to an update where batch_size sets it.

    axolotl's default of gradient_accumulation_steps comes before batch_size, against its own
    documentation. Source: axolotl 0.19.0, utils/config/__init__.py, normalize_config, and
    utils/schemas/training.py (2026-11-27).
    """
    key, steps, rows = "batch_size", "gradient_accumulation_steps", config.micro_batch_size
    if config.batch_size is None:
        return
    if steps in config.model_fields_set:
        why = "found both, which set the same thing; needed one of them"
        yield make_error(
            "bad-value", key, f"{key} contradicts {steps}", why, f"keep {steps} or {key}"
        )
    elif config.batch_size % rows:
        why = f"found {key}: {config.batch_size} and micro_batch_size: {rows}"
        what = f"{key} is not a multiple of micro_batch_size"
        nearest = max(rows, config.batch_size // rows * rows)
        yield make_error("bad-value", key, what, why, f"set {key}: {nearest}")
    else:
        update[steps] = config.batch_size // rows
        what = f"{key}: {config.batch_size} means {steps}: {update[steps]}; axolotl 0.19 does not "
        what += "accumulate for it, against its documentation"
        do = f"replace it by {steps}: {update[steps]}"
        yield make_warning("done-otherwise", key, what, do)

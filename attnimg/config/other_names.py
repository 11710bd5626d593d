"""Replace what axolotl replaces: other names of keys, values that turn a key off, batch_size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from attnimg.config.schema import Config, make_error, make_warning
from attnimg.facts import Finding

# Other name -> key.
# Source: axolotl 0.19.0, utils/schemas/deprecated.py, RemappedParameters;
# utils/schemas/validation.py, check_eval_strategy, check_neftune, check_multipack_buffer_size;
# core/builders/base.py, _configure_precision_settings (2026-11-27)
OTHER_NAMES = {
    "adam_eps": "adam_epsilon",
    "bfloat16": "bf16",
    "evaluation_strategy": "eval_strategy",
    "gc_steps": "gc_collect_steps",
    "model_config": "overrides_of_model_config",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "pretrain_multipack_buffer_size": "streaming_multipack_buffer_size",
    "type_of_model": "model_type",
}


# Keys that an empty text turns off, and keys with numbers that 0 or false turns off.
# Source: axolotl 0.19.0, which tests them by their truth: core/builders/base.py and causal.py,
# loaders/*.py, utils/config/__init__.py, normalize_config, utils/data/shared.py (2026-11-27)
EMPTY_IS_UNSET = frozenset(
    {
        "revision_of_model", "model_type", "tokenizer_type", "tokenizer_config",
        "experts_implementation", "dataset_prepared_path", "chat_template_jinja",
        "default_system_message", "lr_scheduler", "torch_compile_backend", "adapter",
        "lora_target_modules", "lora_target_parameters", "peft_init_lora_weights", "eval_strategy",
        "save_strategy", "metric_for_best_model", "resume_from_checkpoint", "deepspeed",
        "lora_model_dir",
    }
)  # fmt: skip
ZERO_IS_UNSET = frozenset(
    {
        "batch_size", "max_steps", "eval_steps", "save_steps", "save_total_limit",
        "early_stopping_patience", "loss_watchdog_patience", "ddp_timeout", "min_sample_len",
    }
)  # fmt: skip
# Keys of a dataset entry that an empty text turns off.
# Source: axolotl 0.19.0, utils/data/shared.py, load_dataset_with_config; prompt_strategies/
# pretrain.py, load (2026-11-27)
EMPTY_IN_ENTRY_IS_UNSET = frozenset({"name", "data_files", "ds_type", "text_column"})
# Numbers whose 0 turns something off, for which axolotl reads false as 0.
FALSE_IS_ZERO = frozenset(
    {
        "val_set_size", "evals_per_epoch", "saves_per_epoch", "warmup_steps", "warmup_ratio",
        "weight_decay", "max_grad_norm", "neftune_noise_alpha", "lora_dropout",
        "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "dataloader_num_workers",
    }
)  # fmt: skip


def without_unset(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config without those that mean that a key is not set."""
    found = {}
    for name, value in values.items():
        key = OTHER_NAMES.get(name, name)
        if not (
            value is None
            or (value == "" and key in EMPTY_IS_UNSET)
            or (value == 0 and key in ZERO_IS_UNSET)
            or (value == {} and key == "tokens")
        ):
            found[name] = 0 if value is False and key in FALSE_IS_ZERO else value
    return found


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

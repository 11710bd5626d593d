"""Check the keys of preference training in a config (rl: dpo, ipo, orpo, kto).

Only the config is read. Which values of rl exist is in data/keys.toml.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches

from attnimg.config.dataset_rules import Rule, bad_value, placeholder_errors
from attnimg.config.schema import (
    PREFERENCE_METHODS,
    Config,
    PreferenceFormat,
    PromptFormat,
    dataset_entries,
    is_chat,
    make_error,
    preference_types,
    trains_preferences,
)
from attnimg.facts import Finding

# The keys of preference training, and the values of rl that read them.
# Source: axolotl 0.19.0, core/builders/rl.py, _build_training_arguments, and
# core/trainers/dpo/__init__.py, set_training_args_kwargs (2026-11-27)
_READ_BY = {
    "rl_beta": PREFERENCE_METHODS,
    "dpo_loss_type": ("dpo",),
    "dpo_loss_weights": ("dpo",),
    "dpo_label_smoothing": ("dpo",),
    "dpo_use_weighting": ("dpo", "ipo"),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "orpo_alpha": ("orpo",),
}
# Losses of TRL that read label_smoothing. Source: trl 1.16.0, dpo_trainer.py (2026-11-27)
SMOOTHED_LOSSES = ("robust", "exo_pair", "aot", "aot_unpaired")
# Losses for which TRL cannot weight pairs: it sorts them, or changes tensors in place that the
# backward pass needs.
_UNWEIGHTED = ("aot", "aot_unpaired", "hinge", "sft")
# Keys that preference training does not read, and the reason.
_ONE_TOKEN_LOSS = "it changes the loss of single tokens"
_ONE_ROW = "each answer is a row of its own, padded to the longest in its batch"
_NOT_TESTED = "it is not tested with TRL's trainers of preferences"
_UNREAD = {
    "train_on_inputs": _ONE_TOKEN_LOSS,
    "neftune_noise_alpha": "the noise would also change the reference",
    "batch_flattening": _ONE_ROW,
    "pad_to_sequence_len": _ONE_ROW,
    "group_by_length": _ONE_ROW,
    "min_sample_len": _ONE_ROW,
    "pretraining_dataset": "running text has no answers to prefer",
    "streaming": "pairs are read as a whole",
    "streaming_multipack_buffer_size": "pairs are read as a whole",
    "default_system_message": "axolotl does not use it for preference data",
    "chat_template_kwargs": "axolotl does not pass it to the template of preference data",
    "tokenizer_use_mistral_common": "its format of conversations has no preference data",
    "fsdp": _NOT_TESTED,
    "fsdp_config": _NOT_TESTED,
    "deepspeed": _NOT_TESTED,
    "torch_compile": _NOT_TESTED,
    "activation_offloading": _NOT_TESTED,
}
# Keys of a dataset entry that types of preference data read, besides those that locate the data.
_LOCATE = frozenset(
    {"path", "type", "name", "split", "revision", "data_files", "ds_type", "shards", "shards_idx",
     "preprocess_shards", "trust_remote_code"}
)  # fmt: skip
_ANSWERS = frozenset({"field_chosen", "field_rejected"})
_CHAT = _ANSWERS | {
    "field_messages", "message_field_role", "message_field_content", "message_property_mappings",
    "roles", "chat_template", "chat_template_jinja",
}  # fmt: skip
_PLACEHOLDERS = {
    "prompt_format": ("prompt", "system"),
    "chosen_format": ("chosen",),
    "rejected_format": ("rejected",),
    "completion_format": ("completion",),
}


def _keys_of_other_methods(config: Config) -> Iterator[Finding]:
    """Yield an error for each key that the value of rl does not read."""
    for key, methods in _READ_BY.items():
        value = getattr(config, key)
        if value is None or value is False or value == 0 or config.rl in methods:
            continue
        found = f"rl: {config.rl}" if config.rl else "no rl"
        needed = " or ".join(f"rl: {method}" for method in methods)
        why = f"found {found}, which does not read it"
        yield bad_value(key, f"{key} needs {needed}", why, f"remove {key}")
    if config.rl == "orpo" and config.orpo_alpha and config.rl_beta:
        why = "found both, which set the weight of the odds ratio; axolotl uses rl_beta"
        yield bad_value("orpo_alpha", "orpo_alpha contradicts rl_beta", why, "remove orpo_alpha")


def _losses(config: Config) -> Iterator[Finding]:
    """Yield errors: losses of DPO, their weights and label_smoothing that do not fit."""
    if config.rl != "dpo":
        return
    losses, weights = config.dpo_loss_type or ["sigmoid"], config.dpo_loss_weights
    if weights and (config.dpo_loss_type is None or len(weights) != len(losses)):
        why = f"weights: {len(weights)}, losses: {len(config.dpo_loss_type or ())}"
        key, what = "dpo_loss_weights", "dpo_loss_weights needs one loss for each in dpo_loss_type"
        yield bad_value(key, what, why, f"remove {key}")
    key, smoothing = "dpo_label_smoothing", config.dpo_label_smoothing or 0.0
    if smoothing and not set(losses) & set(SMOOTHED_LOSSES):
        why = f"found dpo_loss_type: {losses}; needed one of {', '.join(SMOOTHED_LOSSES)}"
        do = f"remove {key}, or set dpo_loss_type: [robust]"
        yield bad_value(key, f"no loss reads {key}", why, do)
    if "robust" in losses and smoothing >= 0.5:
        why = f"found {smoothing:g}; the robust loss needs less than 0.5, the share of wrong pairs"
        yield bad_value(key, f"{key} is too large", why, f"set {key}: 0.1")
    if "exo_pair" in losses and not smoothing:
        why = "found none; the loss exo_pair takes its logarithm"
        yield bad_value(key, f"exo_pair needs {key}", why, f"set {key}: 0.001")
    unweighted = [loss for loss in losses if loss in _UNWEIGHTED]
    if config.dpo_use_weighting and unweighted:
        key, why = "dpo_use_weighting", "TRL 1.16 cannot weight the pairs of this loss"
        yield bad_value(key, f"{key} contradicts the loss {unweighted[0]}", why, f"remove {key}")


def _unread_keys(config: Config) -> Iterator[Finding]:
    """Yield an error for each key that preference training does not read."""
    if not trains_preferences(config):
        return
    for key, reason in _UNREAD.items():
        if getattr(config, key):
            what = f"{key} cannot be combined with rl: {config.rl}"
            yield bad_value(key, what, reason, f"remove {key}")
    if isinstance(config.gradient_checkpointing, str):
        key, what = "gradient_checkpointing", "activations cannot be offloaded with rl"
        yield bad_value(key, what, _NOT_TESTED, f"set {key}: true")
    if config.excess_length_strategy == "split":
        key, why = (
            "excess_length_strategy",
            "the later parts of a split answer would have no prompt",
        )
        yield bad_value(key, f"{key}: split contradicts rl", why, f"set {key}: truncate")
    for key in ("micro_batch_size", "eval_batch_size") if config.rl == "kto" else ():
        if getattr(config, key) == 1:
            why = "kto estimates the KL term from the other answers of a batch"
            yield bad_value(key, f"rl: kto needs {key} of 2 or more", why, f"set {key}: 2")


def _preference_types(config: Config) -> Iterator[Finding]:
    """Yield an error for each dataset type that has no preference data, or not of this method."""
    if not trains_preferences(config) or config.sample_packing:
        return
    known = preference_types(str(config.rl))
    for entry, spec, _ in dataset_entries(config):
        key = f"{entry}.type"
        if isinstance(spec.type, PromptFormat | PreferenceFormat):
            yield from _format(spec.type, config, key=key)
        elif spec.type is not None and spec.type not in known:
            similar = get_close_matches(spec.type, known, n=1, cutoff=0.0)
            what = f"the dataset type {spec.type} has no data for rl: {config.rl}"
            why = f"{key} is {spec.type}, needed one of {', '.join(known)}, or a mapping"
            yield make_error("unsupported-key", key, what, why, f"set {key}: {similar[0]}")
        read = _CHAT if is_chat(spec) else frozenset()
        unread = [
            name
            for name in sorted(spec.model_fields_set - _LOCATE - read)
            if getattr(spec, name) not in (None, False)
        ]
        for name in unread:
            why = f"found rl: {config.rl} and type: {spec.type or 'none'}, which do not read it"
            what = f"{entry}.{name} has no effect on preference data"
            yield bad_value(f"{entry}.{name}", what, why, f"remove {entry}.{name}")


def _format(
    found: PromptFormat | PreferenceFormat, config: Config, *, key: str
) -> Iterator[Finding]:
    """Yield an error for each part of a mapping that is not read, or can't be filled."""
    read = {"field_prompt", "field_system", "prompt_format"}
    read |= (
        {"field_completion", "field_label", "completion_format"}
        if config.rl == "kto"
        else {"field_chosen", "field_rejected", "chosen_format", "rejected_format"}
    )
    for name in sorted(found.model_fields_set - read):
        why = f"found rl: {config.rl}, which reads {', '.join(sorted(read))}"
        yield bad_value(f"{key}.{name}", f"{key}.{name} is not read", why, f"remove {key}.{name}")
    yield from placeholder_errors(found, _PLACEHOLDERS, key=key)


# Each rule, and the keys that it depends on.
PREFERENCE_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_keys_of_other_methods, ("rl",)),
    (_losses, ("dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing")),
    (_unread_keys, ("rl",)),
    (_preference_types, ("datasets", "test_datasets")),
)

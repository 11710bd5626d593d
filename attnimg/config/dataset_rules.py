"""Check the values of a config that are about datasets and conversations.

Only the config is read. rules.py has the rules on other values.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import get_args

from attnimg.config.schema import (
    COMMON_TYPES,
    DATASET_TYPES,
    Config,
    DatasetSpec,
    PreferenceFormat,
    PromptFormat,
    SpecialToken,
    dataset_entries,
    is_chat,
    is_streamed,
    is_text,
    make_error,
    role_names,
    trains_preferences,
)
from attnimg.facts import Finding

Rule = Callable[[Config], Iterator[Finding]]
# The keys with entries of datasets.
DATASETS = ("datasets", "pretraining_dataset", "test_datasets")
# The form of `split`: names of splits, or rows of them, such as train[:10%]+test.
# Source: datasets 5.2, arrow_reader.py:46, _RelativeInstruction (2026-11-27)
_BOUND = r"-?\d(?:_?\d){0,17}%?"
_PART_OF_SPLIT = re.compile(
    rf"\w+(?:\.\w+)*(?:\[({_BOUND})?:({_BOUND})?\])?(\((?:closest|pct1_dropremainder)\))?"
)
# Axolotl's dataset types that are not implemented, by their first word: those of conversations,
# those whose prompt is too long to repeat here, those of preferences, and of other training.
# Source: axolotl 0.19.0, prompt_strategies and docs/dataset-formats (2026-11-27)
_OF_CONVERSATIONS = frozenset({"sharegpt", "llama2_chat", "pygmalion", "messages"})
_OF_LONG_PROMPTS = frozenset({"creative_acr", "reflection"})
_OF_PREFERENCES = frozenset({"chatml", "llama3", "zephyr", "passthrough"})
_OF_OTHER_TRAINING = frozenset(
    {
        "bradley_terry",
        "stepwise_supervised",
        "_synthetic",
    }
)
# Variables of a chat template that the record or the tokenizer sets.
_TEMPLATE_VARIABLES = frozenset(
    {"messages", "conversations", "tools", "documents", "template", "chat_template",
     "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask",
     *get_args(SpecialToken)}
)  # fmt: skip
# The chat templates that a config can name: those of train/data/named_templates.py, the
# tokenizer's, and names that tokenizers with several templates have.
CHAT_TEMPLATES = (
    "chatml", "llama3", "llama4", "falcon_h1", "nemotron_h", "phi_3", "phi_35", "deepseek_v2",
    "aya", "cohere", "gemma", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "qwen_25", "qwen3",
    "qwen3_5", "tokenizer_default", "jinja", "default", "tool_use", "rag",
)  # fmt: skip
FALLBACK = "tokenizer_default_fallback_"
# Axolotl's chat templates that are not implemented.
# Source: axolotl 0.19.0, utils/chat_templates (2026-11-27)
TEMPLATES_OF_AXOLOTL = frozenset(
    {"alpaca", "command_a", "command_a_rag", "command_a_tool_use", "deepseek_v3", "exaone",
     "exaone4", "jamba", "llama3_2_vision", "llava", "metharme", "mistral_v1", "mistral_v2v3",
     "mistral_v3_tekken", "mistral_v7_tekken", "phi_4", "pixtral", "qwen2_vl"}
)  # fmt: skip
# What the texts of a prompt in the config may have in braces.
_PLACEHOLDERS = {
    "format": ("instruction", "input"),
    "no_input_format": ("instruction",),
    "system_format": ("system",),
}


def bad_value(key: str, what: str, why: str, do: str) -> Finding:
    """Return an error for a value; see make_error."""
    return make_error("bad-value", key, what, why, do)


def _dataset_types(config: Config) -> Iterator[Finding]:
    """Yield an error for each unknown type; `train` finds a missing one from the columns.

    preference_rules.py has the types of preference data.
    """
    if trains_preferences(config):
        return
    for entry, spec, _ in dataset_entries(config):
        key = f"{entry}.type"
        if isinstance(spec.type, PromptFormat):
            yield from placeholder_errors(spec.type, _PLACEHOLDERS, key=key)
        if isinstance(spec.type, PreferenceFormat):
            what = f"{key} describes preference data"
            why = f"found {', '.join(sorted(spec.type.model_fields_set))}, and no rl"
            yield bad_value(key, what, why, "set rl: dpo")
        if not isinstance(spec.type, str) or spec.type in DATASET_TYPES:
            continue
        first, do = re.split(r"[.:]", spec.type)[0], ""
        if first in _OF_CONVERSATIONS:
            do = f"set {key}: chat_template"
        elif first in _OF_LONG_PROMPTS:
            do = f"set {key}: chat_template, and write each record as messages"
        elif first in _OF_PREFERENCES:
            do = "set rl: dpo"
        elif first in _OF_OTHER_TRAINING or first.startswith("ebft"):
            do = f"remove {entry}; attnimg trains language models on text"
        if do:
            what = f"the dataset type {spec.type} is not implemented"
            why = f"{key} is {spec.type}, a type of axolotl that attnimg does not read"
            yield make_error("unsupported-key", key, what, why, do)
            continue
        similar = get_close_matches(spec.type, DATASET_TYPES, n=1)
        why = f"{key} is {spec.type}, needed one of {', '.join(DATASET_TYPES)}"
        do = f"set {key}: {' or '.join(similar or COMMON_TYPES)}"
        yield bad_value(key, f"unknown dataset type {spec.type!r}", why, do)


def placeholder_errors(
    found: PromptFormat | PreferenceFormat, placeholders: Mapping[str, Collection[str]], *, key: str
) -> Iterator[Finding]:
    """Yield an error for each text of a mapping with other names in braces than it may have.

    Args:
        found: the mapping as `type` of a dataset entry.
        placeholders: the key of each text -> the names that it may have.
        key: the key of the mapping in the config, such as "datasets[0].type".
    """
    for name, allowed in placeholders.items():
        text = getattr(found, name, None) or ""
        named = " and ".join(f"{{{one}}}" for one in allowed)
        try:
            fields = [field[1:] for field in string.Formatter().parse(text) if field[1] is not None]
            wrong = [one for one, *more in fields if one not in allowed or any(more)]
            why = f"found {{{wrong[0]}}} in it, needed {named}" if wrong else ""
        except ValueError as error:
            why = f"{error}; needed {named}, and {{{{ for a brace in the text"
        if why:
            do = f"remove {key}.{name}"
            yield bad_value(f"{key}.{name}", f"{key}.{name} cannot be filled", why, do)


def _trained_roles(config: Config) -> Iterator[Finding]:
    """Yield an error for each name in roles_to_train that no message can have."""
    for entry, spec, _ in dataset_entries(config):
        known, key = role_names(spec), f"{entry}.roles_to_train"
        requested = (spec.roles_to_train or []) if is_chat(spec) else []
        unknown = [name for name in requested if name not in {*known, *known.values()}]
        if not unknown:
            continue
        similar = get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        named = [known.get(name, name) for name in requested if name in known]
        fitting = list(dict.fromkeys([*named, *(known[name] for name in similar)]))
        what = f"unknown role in roles_to_train: {unknown[0]!r}"
        why = f"{key} has {', '.join(unknown)}, needed one of {', '.join(known)}"
        yield bad_value(key, what, why, f"set {key}: [{', '.join(fitting)}]")


def _messages(config: Config) -> Iterator[Finding]:
    """Yield errors: one message key for two things, and one end token with two settings."""
    for entry, spec, _ in dataset_entries(config):
        if not is_chat(spec):
            continue
        mappings = spec.message_property_mappings or {}
        used = {
            mappings.get("role", spec.message_field_role or "role"): "the role",
            mappings.get("content", spec.message_field_content or "content"): "the content",
        }
        for name in ("field_thinking", "message_field_training", "message_field_training_detail"):
            value = getattr(spec, name)
            if value in used:
                key, why = f"{entry}.{name}", f"{value} is the key of {used[value]}"
                yield bad_value(key, f"{key} is used already", why, f"remove {key}")
            elif value:
                used[value] = name
        eos, eot, key = spec.train_on_eos or "turn", spec.train_on_eot, f"{entry}.train_on_eot"
        if eot not in (None, eos):
            what = f"{key}: {eot} contradicts train_on_eos: {eos}"
            if not config.eot_tokens:
                why = "found no eot_tokens, so both are about the tokenizer's eos_token"
                yield bad_value(key, what, why, f"remove {key}")
            elif {eos, eot} == {"all", "last"}:
                why = "the last turn may not be the last trained one; needed one value"
                yield bad_value(key, what, why, f"set {key}: {eos}")


def _shards(config: Config) -> Iterator[Finding]:
    for entry, spec, _ in dataset_entries(config):
        if spec.shards and (spec.shards_idx or 0) >= spec.shards:
            key, most = f"{entry}.shards_idx", spec.shards - 1
            why = f"found {spec.shards_idx} of {spec.shards} shards, needed 0 to {most}"
            yield bad_value(key, f"{key} is not a shard", why, f"set {key}: {most}")


def _streaming(config: Config) -> Iterator[Finding]:
    """Yield errors: a stream without an end, and keys that need all of its documents.

    Source: axolotl 0.19.0, utils/schemas/validation.py, StreamingValidationMixin (2026-11-27)
    """
    if config.pretrain_multipack_attn is False and config.sample_packing:
        key, what = "pretrain_multipack_attn", "packed documents cannot see each other"
        why = "found false; attnimg isolates packed documents in every run, and proves it"
        yield make_error("unsupported-key", key, what, why, f"remove {key}")
    if not is_streamed(config):
        return
    if not config.max_steps:
        why = "found none; it decides how many records of the stream are read"
        yield bad_value("max_steps", "a stream needs max_steps", why, "set max_steps: 1000")
    if config.val_set_size:
        why = "only a part of the stream is read, so a share of it cannot be evaluated"
        do = "remove val_set_size"
        yield bad_value("val_set_size", "val_set_size contradicts streaming", why, do)
    if config.dataset_exact_deduplication:
        key, why = "dataset_exact_deduplication", "it removes documents after the stream is read"
        yield bad_value(key, f"{key} contradicts streaming", why, f"remove {key}")
    specs = [key for key, _, trains in dataset_entries(config) if trains]
    if len(specs) > 1:
        why = f"found {len(specs)} datasets to train on, needed one"
        yield bad_value("streaming", "streaming needs a single dataset", why,
                         "set streaming: false")  # fmt: skip
    for entry, spec, trains in dataset_entries(config):
        if trains and spec.shards:
            key, why = (
                f"{entry}.shards",
                "a shard is chosen from all records, which must be counted",
            )
            yield bad_value(key, f"{key} contradicts streaming", why, f"remove {key}")


def _template_variables(config: Config) -> Iterator[Finding]:
    key = "chat_template_kwargs"
    for name in _TEMPLATE_VARIABLES.intersection(config.chat_template_kwargs or ()):
        why = f"found {name}, which the records or the tokenizer set"
        yield bad_value(key, f"{key} cannot set {name}", why, f"remove {key}.{name}")


def _splits(config: Config) -> Iterator[Finding]:
    for entry, spec, _ in dataset_entries(config):
        if not all(map(_is_split_or_rows, re.split(r"\s*\+\s*", spec.split or "train"))):
            key = f"{entry}.split"
            why = f"{key} is {spec.split!r}; needed a split, or rows of one"
            do = f"set {key}: train, or train[:1000], or train[10%:20%]"
            yield bad_value(key, f"{spec.split} does not name a split", why, do)


def _is_split_or_rows(text: str) -> bool:
    """Return whether the datasets library parses a text as a split or as rows of one."""
    if (found := _PART_OF_SPLIT.fullmatch(text)) is None:
        return False
    first, last, rounding = found.groups()
    if "%" not in f"{first}{last}":
        return rounding is None
    return all(abs(int(bound.rstrip("%"))) <= 100 for bound in (first, last) if bound)


def _templates(config: Config) -> Iterator[Finding]:
    """Yield errors: no or unknown template, and an unused system message."""
    specs = {f"{key}.": spec for key, spec, _ in dataset_entries(config)}
    chats = {place: spec for place, spec in specs.items() if is_chat(spec)}
    holders: dict[str, Config | DatasetSpec] = {"": config, **chats} if chats else {}
    for place, holder in holders.items():
        if holder.chat_template == "jinja" and not holder.chat_template_jinja:
            key = f"{place}chat_template"
            why = f"found {key}: jinja and no {key}_jinja, which would contain the template"
            yield bad_value(key, f"{key}: jinja has no template", why, f"remove {key}")
        if holder.chat_template in TEMPLATES_OF_AXOLOTL:
            key = f"{place}chat_template"
            what = f"the chat template {holder.chat_template} is not implemented"
            why = "found a name of axolotl's own templates; the model's tokenizer has its template"
            yield make_error("unsupported-key", key, what, why, f"set {key}: tokenizer_default")
        elif holder.chat_template:
            yield from _unknown_template(holder.chat_template, f"{place}chat_template")
    key = "default_system_message"
    if not config.default_system_message or not all(spec.type for spec in specs.values()):
        return
    if specs and not chats:
        why = "found no dataset of type chat_template, the only type with system turns"
        yield bad_value(key, f"{key} has no effect here", why, f"remove {key}")
    elif any(not is_chat(spec) and not is_text(spec) for spec in specs.values()):
        why = "found a dataset whose type has a prompt with a fixed text"
        what = f"{key} has no effect on its records"
        yield make_error("unsupported-key", key, what, why, f"remove {key}")


def _unknown_template(name: str, key: str) -> Iterator[Finding]:
    if name in CHAT_TEMPLATES or name.startswith(FALLBACK):
        return
    what = f"unknown chat template {name[:40]!r}"
    if any(sign in name for sign in ("{{", "{%", "/", ".jinja")):
        why, do = (
            "found a template; needed a name",
            f"set {key}: jinja, and write it in {key}_jinja",
        )
    else:
        similar = get_close_matches(name, CHAT_TEMPLATES, n=1)
        why = f"needed one of {', '.join(CHAT_TEMPLATES)}"
        do = f"set {key}: {similar[0] if similar else 'tokenizer_default'}"
    yield bad_value(key, what, why, do)


# Each rule, and the keys that it depends on.
DATASET_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_dataset_types, ()),
    (_trained_roles, ()),
    (_messages, ("eot_tokens",)),
    (_shards, ()),
    (_streaming, ("streaming_multipack_buffer_size", "max_steps", "val_set_size")),
    (_template_variables, ()),
    (_splits, ()),
    (_templates, ("chat_template", "chat_template_jinja")),
)

"""Check the values of a config: those that `train` would refuse, and keys without effect.

Only the config is read. Rules on attention are in attention.py, types and ranges in schema.py;
`train` checks what depends on files, the model, the machine or installed packages.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import get_args

from attnimg.config.schema import (
    COMMON_TYPES,
    DATASET_TYPES,
    BnbArgument,
    Config,
    DatasetSpec,
    PromptFormat,
    SpecialToken,
    dataset_entries,
    is_chat,
    is_streamed,
    is_text,
    make_error,
    make_warning,
    offloading_mode,
    role_names,
    trackers,
    type_name,
)
from attnimg.config.weight_patterns import parse_weight_pattern
from attnimg.facts import Finding

# Pairs of keys for the same setting; only one of them may be set.
_EITHER_OR = (
    ("warmup_steps", "warmup_ratio"),
    ("cosine_min_lr_ratio", "eta_min"),
    ("embedding_lr", "embedding_lr_scale"),
    ("loraplus_lr_ratio", "embedding_lr"),
    ("loraplus_lr_ratio", "embedding_lr_scale"),
    ("save_steps", "saves_per_epoch"),
    ("eval_steps", "evals_per_epoch"),
    ("datasets", "pretraining_dataset"),
    ("dataset_num_proc", "dataset_processes"),
    ("test_datasets", "val_set_size"),
    ("load_in_4bit", "load_in_8bit"),
    ("deepspeed", "fsdp"),
)
# A key and its older name; one of them may be set, to true or false.
# Source: axolotl 0.19.0, integrations/liger/args.py, check_deprecated_swiglu (2026-11-27)
_RENAMED = ("liger_glu_activation", "liger_swiglu")
# Schedules that need an argument: its possible names, and an example value.
SCHEDULER_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "1e-6"),
    "warmup_stable_decay": (("num_decay_steps",), "10"),
}
# The values of the arguments of BitsAndBytesConfig.
# Source: transformers 5.22.2, utils/quantization_config.py, BitsAndBytesConfig (2026-11-27)
_DTYPES = ("bfloat16", "float16", "float32")
BNB_VALUES: dict[BnbArgument, tuple[bool | str, ...]] = {
    "bnb_4bit_compute_dtype": _DTYPES,
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_quant_storage": ("uint8", *_DTYPES),
}
# Keys that change a tokenizer or its template.
_NOT_WITH_MISTRAL = (
    "special_tokens", "tokens", "eot_tokens", "chat_template", "chat_template_jinja",
    "tokenizer_type", "tokenizer_legacy",
)  # fmt: skip
# Keys that only the cosine schedule reads, and what they add to it.
_COSINE_KEYS = {
    "cosine_min_lr_ratio": "a minimum learning rate",
    "eta_min": "a minimum learning rate",
    "cosine_constant_lr_ratio": "a constant end",
    "lr_quadratic_warmup": "a quadratic warmup",
}
# The form of `split`: names of splits, or rows of them, such as train[:10%]+test.
# Source: datasets 5.2, arrow_reader.py:46, _RelativeInstruction (2026-11-27)
_BOUND = r"-?\d(?:_?\d){0,17}%?"
_PART_OF_SPLIT = re.compile(
    rf"\w+(?:\.\w+)*(?:\[({_BOUND})?:({_BOUND})?\])?(\((?:closest|pct1_dropremainder)\))?"
)
# Optimizers without betas, or without epsilon. Source: transformers 5.22.2, trainer_optimizer.py,
# _get_adafactor, _get_bitsandbytes_optimizer, _get_sgd, _get_adagrad, _get_rmsprop (2026-11-27)
_NO_BETAS = frozenset({"adafactor", "sgd", "adagrad", "rmsprop"})
_NO_EPSILON = _NO_BETAS | {"lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"}
# Keys of a dataset entry that only one kind of dataset type reads.
_CHAT_KEYS = frozenset(
    {"field_messages", "message_field_role", "message_field_content", "message_property_mappings",
     "roles", "roles_to_train", "train_on_eos", "train_on_eot", "chat_template",
     "chat_template_jinja", "field_system", "field_tools", "field_thinking",
     "template_thinking_key", "split_thinking", "drop_system_message", "message_field_training",
     "message_field_training_detail"}
)  # fmt: skip
_TEXT_KEYS = frozenset({"field", "text_column"})
# Axolotl's dataset types that are not implemented, by their first word: those of conversations,
# those whose prompt is too long to repeat here, and those of other kinds of training.
# Source: axolotl 0.19.0, prompt_strategies and docs/dataset-formats (2026-11-27)
_OF_CONVERSATIONS = frozenset({"sharegpt", "llama2_chat", "pygmalion", "messages"})
_OF_LONG_PROMPTS = frozenset({"creative_acr", "reflection"})
_OF_OTHER_TRAINING = frozenset(
    {
        "bradley_terry",
        "stepwise_supervised",
        "chatml",
        "llama3",
        "zephyr",
        "passthrough",
        "_synthetic",
    }
)
# Variables of a chat template that the record or the tokenizer sets.
_TEMPLATE_VARIABLES = frozenset(
    {"messages", "conversations", "tools", "documents", "template", "chat_template",
     "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask",
     *get_args(SpecialToken)}
)  # fmt: skip
# Axolotl's chat templates that are not implemented; the others are in
# train/data/named_templates.py. Source: axolotl 0.19.0, utils/chat_templates (2026-11-27)
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


def _bad_value(key: str, what: str, why: str, do: str) -> Finding:
    return make_error("bad-value", key, what, why, do)


def value_errors(config: Config, failed: Collection[str]) -> Iterator[Finding]:
    """Yield every reason why `train` would refuse the values of a config.

    Args:
        config: the valid part of the config.
        failed: the keys that are not in it because their values are invalid.
    """
    for rule, keys in _RULES:
        if not set(keys) & set(failed):
            yield from rule(config)


def _contradictions(config: Config) -> Iterator[Finding]:
    for first, second in _EITHER_OR:
        values = [getattr(config, key) for key in (first, second)]
        # warmup_steps: 0 contradicts a ratio; other zeros and empty lists mean that a key is off.
        if all(values) or (first == "warmup_steps" and None not in values):
            why = "found both, which set the same thing; needed one of them"
            do = f"keep {first} or {second}"
            yield _bad_value(second, f"{second} contradicts {first}", why, do)
    if None not in (getattr(config, key) for key in _RENAMED):
        new, old = _RENAMED
        why = f"found both; {old} is the older name of {new}"
        yield _bad_value(old, f"{old} contradicts {new}", why, f"remove {old}")
    if config.fp16 and config.bf16 in (True, "full"):
        why = "found fp16: true and bf16: true, needed one of them"
        yield _bad_value("fp16", "fp16 contradicts bf16", why, "keep bf16 or fp16")
    for verb in ("eval", "save"):
        strategy = getattr(config, f"{verb}_strategy")
        if strategy not in ("no", "epoch", "best"):
            continue
        if getattr(config, f"{verb}_steps") or getattr(config, f"{verb}s_per_epoch"):
            key = f"{verb}_strategy"
            what = f"{key}: {strategy} contradicts {verb}_steps or {verb}s_per_epoch"
            why = f"{verb}_steps and {verb}s_per_epoch need {key}: steps, or no {key}"
            yield _bad_value(key, what, why, f"remove {key}")


def _schedule(config: Config) -> Iterator[Finding]:
    name = config.lr_scheduler
    used = [key for key in _COSINE_KEYS if getattr(config, key) not in (None, False)]
    for key in used if name != "cosine" else ():
        do = f"set lr_scheduler: cosine, or remove {key}"
        what = f"{key} contradicts lr_scheduler: {name}"
        yield _bad_value(key, what, f"only the cosine schedule has {_COSINE_KEYS[key]}", do)
    if name == "cosine":
        yield from _cosine(config)
    needed, value = SCHEDULER_NEEDS.get(name, ((), ""))
    if needed and not set(needed) & set(config.lr_scheduler_kwargs or {}):
        key = "lr_scheduler_kwargs"
        do = f"set {key}: {{{needed[0]}: {value}}}"
        what = f"lr_scheduler: {name} needs {key}"
        yield _bad_value(key, what, f"needed {' or '.join(needed)}", do)


def _cosine(config: Config) -> Iterator[Finding]:
    """Yield errors: keys of the cosine schedule that contradict one another."""
    key = "cosine_constant_lr_ratio"
    if config.cosine_constant_lr_ratio and not config.cosine_min_lr_ratio:
        why = "it is the share of the steps after which that learning rate stays"
        do = f"set cosine_min_lr_ratio: 0.1, or remove {key}"
        yield _bad_value(key, f"{key} needs cosine_min_lr_ratio", why, do)
    if config.eta_min and config.eta_min > (config.learning_rate or math.inf):
        key, why = "eta_min", f"found {config.eta_min} and learning_rate: {config.learning_rate}"
        yield _bad_value(key, f"{key} is above learning_rate", why, f"remove {key}")
    variant = next((key for key in ("lr_quadratic_warmup", "cosine_constant_lr_ratio")
                    if getattr(config, key)), None)  # fmt: skip
    if variant is None:
        return
    # Source: axolotl 0.19.0, core/trainers/mixins/scheduler.py, create_scheduler, which ignores
    # what is refused here (2026-11-27).
    others = ["eta_min", "lr_scheduler_kwargs"]
    if variant == "lr_quadratic_warmup":
        others += ["cosine_min_lr_ratio", "cosine_constant_lr_ratio"]
    for key in others:
        if getattr(config, key):
            why = f"found both; the cosine with {variant} does not read {key}"
            yield _bad_value(key, f"{key} contradicts {variant}", why, f"keep {key} or {variant}")


def _evaluation(config: Config) -> Iterator[Finding]:
    """Yield errors: evaluation without documents, and a val_set_size that is not valid."""
    size = config.val_set_size
    if size == 1 or (size > 1 and not size.is_integer()):
        taken = "all documents (1 is 100 %)" if size == 1 else "a part of a document"
        why = f"it is {taken}; needed a share below 1, or a whole number of documents from 2 on"
        what = f"val_set_size {size:g} is not valid"
        yield _bad_value("val_set_size", what, why, "set val_set_size: 0.05")
    stopping = config.early_stopping_patience and "early_stopping_patience"
    if config.lr_scheduler == "reduce_lr_on_plateau":
        stopping = "lr_scheduler: reduce_lr_on_plateau"
    if config.load_best_model_at_end:
        stopping = "load_best_model_at_end"
    if config.save_strategy == "best":
        stopping = "save_strategy: best"
    if config.load_best_model_at_end and config.save_strategy == "no":
        why, do = "the best model is loaded from its checkpoint", "remove save_strategy"
        what = "save_strategy: no contradicts load_best_model_at_end"
        yield _bad_value("save_strategy", what, why, do)
    if size or config.test_datasets:
        if stopping and config.eval_strategy == "no":
            key, why = "eval_strategy", "it needs the validation loss, which is never computed"
            yield _bad_value(key, f"{key}: no contradicts {stopping}", why,
                          f"remove {key}")  # fmt: skip
        return
    why = "found val_set_size: 0 and no test_datasets"
    unused = _unused_evaluation_keys(config)
    requested = [
        key
        for key in ("eval_steps", "early_stopping_patience", "eval_strategy",
                    "load_best_model_at_end")
        if getattr(config, key) not in (None, False, "no") and key not in unused
    ]  # fmt: skip
    for key in requested[:1]:
        do = f"set val_set_size: 0.05, or remove {key}"
        yield _bad_value(key, f"{key} needs evaluation data", why, do)
    if config.lr_scheduler == "reduce_lr_on_plateau":
        what = "lr_scheduler: reduce_lr_on_plateau needs evaluation data"
        yield _bad_value("lr_scheduler", what, why, "set val_set_size: 0.05")
    if config.save_strategy == "best":
        what = "save_strategy: best needs evaluation data"
        do = "set val_set_size: 0.05, or remove save_strategy"
        yield _bad_value("save_strategy", what, why, do)


def _unused_evaluation_keys(config: Config) -> list[str]:
    """Return the keys on evaluations that have no effect, since the run has nothing to evaluate on.

    evals_per_epoch stands in many configs without such data. The other two say that evaluations
    are wanted, unless the config turns them off with val_set_size: 0.
    Source: axolotl 0.19.0, utils/config/__init__.py, normalize_config (2026-11-27).
    """
    if config.val_set_size or config.test_datasets:
        return []
    keys = ["evals_per_epoch"]
    if "val_set_size" in config.model_fields_set:
        keys += ["eval_steps", "eval_strategy"]
    return [key for key in keys if getattr(config, key) not in (None, 0, "no")]


def value_warnings(config: Config, failed: Collection[str]) -> Iterator[Finding]:
    """Yield a warning for each key whose values are used otherwise than a reader may expect.

    Args:
        config: the valid part of the config.
        failed: the keys that are not in it because their values are invalid.
    """
    if not {"val_set_size", "test_datasets"} & set(failed):
        for key in _unused_evaluation_keys(config):
            what = f"{key} has no effect: there is no evaluation data"
            do = f"set val_set_size: 0.05, or remove {key}"
            yield make_warning("without-effect", key, what, do)
    if config.eta_min:
        what = "the cosine ends at eta_min here; axolotl 0.19 does not read it, and ends at 0"
        yield make_warning("done-otherwise", "eta_min", what, "remove eta_min")
    if config.peft_init_lora_weights is False:
        key = "peft_init_lora_weights"
        what = f"{key}: false has no effect, as in axolotl: adapters start without an effect"
        yield make_warning("without-effect", key, what, f"remove {key}")
    for key, value, same in (("activation_offloading", "disk", "true"),
                             ("gradient_checkpointing", "offload_disk", "offload")):  # fmt: skip
        if getattr(config, key) == value:
            what = f"{key}: {value} moves activations to CPU memory, as in axolotl, not to a disk"
            yield make_warning("done-otherwise", key, what, f"set {key}: {same}")


def _adapter(config: Config) -> Iterator[Finding]:
    if config.adapter == "qlora" and (config.load_in_4bit is False or config.load_in_8bit):
        key = "load_in_8bit" if config.load_in_8bit else "load_in_4bit"
        yield _bad_value(key, f"{key} contradicts adapter: qlora",
                      "qlora needs weights that are loaded in 4 bits",
                      f"remove {key}, or set adapter: lora")  # fmt: skip
    targets, layers = config.lora_target_modules or [], config.peft_layers_to_transform
    is_pattern = isinstance(targets, str) and targets.lower() != "all-linear"
    if layers and (is_pattern or any("." in name for name in targets)):
        key = "peft_layers_to_transform"
        yield _bad_value(key, f"{key} needs short names in lora_target_modules",
                         f"found {targets}; PEFT compares {key} with the last part of names",
                         f"remove {key}")  # fmt: skip
    if config.peft_layers_pattern and not config.peft_layers_to_transform:
        key, needed = "peft_layers_pattern", "peft_layers_to_transform"
        yield _bad_value(key, f"{key} needs {needed}", f"found no {needed}", f"remove {key}")
    if config.adapter is None and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        fitting = "qlora" if config.load_in_4bit else "lora"
        yield _bad_value(key, f"{key} needs an adapter",
                      f"found no adapter; weights in {key[8:]} cannot be trained",
                      f"set adapter: {fitting}, or remove {key}")  # fmt: skip
    if config.adapter is None and config.loraplus_lr_ratio:
        key, why = (
            "loraplus_lr_ratio",
            "it is the ratio of the learning rates of LoRA's two weights",
        )
        do = f"set adapter: lora, or remove {key}"
        yield _bad_value(key, f"{key} needs an adapter", why, do)
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        key = "lora_target_modules"
        yield _bad_value(key, f"{key} cannot include lm_head",
                      "the loss reads lm_head's own weight, so its adapter would not be trained",
                      "move lm_head to lora_modules_to_save")  # fmt: skip


def _quantization(config: Config) -> Iterator[Finding]:
    """Yield errors: arguments of a quantization that transformers or bitsandbytes refuses."""
    for argument, value in (config.bnb_config_kwargs or {}).items():
        if type(value) in (bool, str) and value in BNB_VALUES[argument]:
            continue
        choices = ", ".join(str(v).lower() for v in BNB_VALUES[argument])
        yield _bad_value("bnb_config_kwargs", f"bnb_config_kwargs.{argument} has an invalid value",
                         f"found {value!r}; needed {choices}",
                         f"remove bnb_config_kwargs, or correct {argument} in it")  # fmt: skip
    yield from _quantized_experts(config)
    name, arguments = config.model_quantization_config, config.model_quantization_config_kwargs
    key = "model_quantization_config_kwargs"
    if name and arguments != {"dequantize": True}:
        yield _bad_value(key, f"{name} is only implemented with dequantize: true",
                         f"found {key}: {arguments or 'none'}; weights that stay quantized by "
                         f"{name} can't be trained, and an adapter on them is not tested",
                         f"set {key}: {{dequantize: true}}")  # fmt: skip
    elif arguments and not name:
        yield _bad_value(key, f"{key} has no quantization", "found no model_quantization_config",
                         f"remove {key}")  # fmt: skip


def _quantized_experts(config: Config) -> Iterator[Finding]:
    """Yield errors: experts that can't be quantized, or not be trained when they are."""
    key = "quantize_moe_experts"
    if not config.quantize_moe_experts:
        return
    if not (config.load_in_4bit or config.load_in_8bit or config.adapter == "qlora"):
        yield _bad_value(key, f"{key} needs weights in 4 or 8 bits",
                         "found neither load_in_4bit nor load_in_8bit",
                         f"set adapter: qlora, or remove {key}")  # fmt: skip
    names = [name for name in ("lora_target_linear", "lora_target_parameters")
             if getattr(config, name)]  # fmt: skip
    for name in names[:1]:
        yield _bad_value(key, f"{key} contradicts {name}",
                         "PEFT would train only one of several quantized weights of a layer",
                         f"remove {' and '.join(names)}, or remove {key}")  # fmt: skip
    sharding = [name for name in ("deepspeed", "fsdp", "fsdp_config") if getattr(config, name)]
    if sharding:
        yield _bad_value(key, f"{key} contradicts {sharding[0]}",
                         "sharding quantized experts over processes is not implemented",
                         f"remove {' and '.join(sharding)}, or remove {key}")  # fmt: skip


def _mistral_common(config: Config) -> Iterator[Finding]:
    """Yield errors: keys that mistral-common's tokenizer has no counterpart for.

    Source: axolotl 0.19.0, utils/schemas/validation.py, check_mistral_common_incompatible_options
    (2026-11-27)
    """
    if not config.tokenizer_use_mistral_common:
        return
    keys = {key: getattr(config, key) for key in _NOT_WITH_MISTRAL}
    for entry, spec, _ in dataset_entries(config):
        templates = ("chat_template", "chat_template_jinja")
        keys |= {f"{entry}.{key}": getattr(spec, key) for key in templates}
        names = role_names(spec)
        trained = {names.get(role, role) for role in spec.roles_to_train or ["assistant"]}
        keys[f"{entry}.roles_to_train"] = is_chat(spec) and trained != {"assistant"}
    for key in (key for key, value in keys.items() if value):
        why = "tokenizer_use_mistral_common: true takes tokens and format of conversations from "
        why += "mistral-common, in which the assistant is trained"
        yield _bad_value(key, f"{key} contradicts tokenizer_use_mistral_common", why,
                         f"remove {key}, or remove tokenizer_use_mistral_common")  # fmt: skip


def _trained_weights(config: Config) -> Iterator[Finding]:
    """Yield errors: weights that can't be trained, or not be loaded, with the config's adapter."""
    if config.unfrozen_parameters:
        key = "unfrozen_parameters"
        arguments = config.gradient_checkpointing_kwargs or {}
        if config.adapter:
            yield _bad_value(key, f"{key} contradicts adapter: {config.adapter}",
                             "an adapter freezes the model's weights, and is saved without them; "
                             f"axolotl compares {key} with PEFT's names of weights, which begin "
                             "with base_model, so that patterns for the model freeze the adapter",
                             f"remove {key}: an adapter trains only its own weights, and only those"
                             " on the language model")  # fmt: skip
        elif arguments.get("use_reentrant") is True:
            why = "checkpoints that are reentrant lose the gradients of a partly frozen model"
            do = "set gradient_checkpointing_kwargs: {use_reentrant: false}"
            yield _bad_value(key, f"{key} contradicts use_reentrant: true", why, do)
        elif (config.fsdp or config.fsdp_config or config.deepspeed) and any(
            parse_weight_pattern(pattern)[1] for pattern in config.unfrozen_parameters
        ):
            names = ("deepspeed", "fsdp", "fsdp_config")
            sharding = " and ".join(name for name in names if getattr(config, name))
            why = "found a pattern with rows; no process has all rows of a sharded weight"
            yield _bad_value(key, f"{key} can't name rows with {sharding}", why,
                             f"remove {sharding}, or name whole weights in {key}")  # fmt: skip
    if config.reinit_weights and config.adapter:
        yield _bad_value("reinit_weights", f"reinit_weights contradicts adapter: {config.adapter}",
                         "an adapter is saved without the model's weights, which would be random "
                         "and lost", "remove reinit_weights, or remove adapter")  # fmt: skip


def hints(config: Config) -> Iterator[Finding]:
    """Yield a warning for each value that changes speed or memory alone and is not used."""
    name = config.experts_implementation
    if name in ("scattermoe", "sonicmoe"):
        yield make_warning(
            "hint-not-used", "experts_implementation",
            f"experts_implementation: {name} is not used: the kernel would compute the experts "
            "faster, and the same; transformers' grouped_mm runs",
            "set experts_implementation: grouped_mm; if memory does not suffice, lower "
            "micro_batch_size",
        )  # fmt: skip


def _offloading(config: Config) -> Iterator[Finding]:
    """Yield an error for activation_offloading without checkpointed layers, as axolotl does."""
    key = "activation_offloading"
    if config.activation_offloading and not config.gradient_checkpointing:
        why = "it moves what checkpointed layers keep; found gradient_checkpointing: false"
        do = f"set gradient_checkpointing: true, or remove {key}"
        yield _bad_value(key, f"{key} needs gradient_checkpointing", why, do)
    arguments = config.gradient_checkpointing_kwargs or {}
    if offloading_mode(config) and arguments.get("use_reentrant"):
        key = "gradient_checkpointing_kwargs"
        why = "found use_reentrant: true, which runs a backward pass inside the backward pass"
        do = f"set {key}: {{use_reentrant: false}}"
        yield _bad_value(key, "activation_offloading contradicts use_reentrant", why, do)


def _dataset_types(config: Config) -> Iterator[Finding]:
    """Yield an error for each unknown type; `train` finds a missing one from the columns."""
    for entry, spec, _ in dataset_entries(config):
        key = f"{entry}.type"
        if isinstance(spec.type, PromptFormat):
            yield from _placeholders(spec.type, key=key)
        if not isinstance(spec.type, str) or spec.type in DATASET_TYPES:
            continue
        first, do = re.split(r"[.:]", spec.type)[0], ""
        if first in _OF_CONVERSATIONS:
            do = f"set {key}: chat_template"
        elif first in _OF_LONG_PROMPTS:
            do = f"set {key}: chat_template, and write each record as messages"
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
        yield _bad_value(key, f"unknown dataset type {spec.type!r}", why, do)


def _placeholders(found: PromptFormat, *, key: str) -> Iterator[Finding]:
    """Yield an error for each text of a prompt with something else in braces than it may have."""
    for name, allowed in _PLACEHOLDERS.items():
        text = getattr(found, name) or ""
        named = " and ".join(f"{{{one}}}" for one in allowed)
        try:
            fields = [field[1:] for field in string.Formatter().parse(text) if field[1] is not None]
            wrong = [one for one, *more in fields if one not in allowed or any(more)]
            why = f"found {{{wrong[0]}}} in it, needed {named}" if wrong else ""
        except ValueError as error:
            why = f"{error}; needed {named}, and {{{{ for a brace in the text"
        if why:
            do = f"remove {key}.{name}"
            yield _bad_value(f"{key}.{name}", f"{key}.{name} cannot be filled", why, do)


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
        yield _bad_value(key, what, why, f"set {key}: [{', '.join(fitting)}]")


def _messages(config: Config) -> Iterator[Finding]:
    """Yield errors: keys of messages for two things, and end tokens trained in two ways."""
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
                yield _bad_value(key, f"{key} is used already", why, f"remove {key}")
            elif value:
                used[value] = name
        eos, eot, key = spec.train_on_eos or "turn", spec.train_on_eot, f"{entry}.train_on_eot"
        if eot not in (None, eos):
            what = f"{key}: {eot} contradicts train_on_eos: {eos}"
            if not config.eot_tokens:
                why = "found no eot_tokens, so both are about the tokenizer's eos_token"
                yield _bad_value(key, what, why, f"remove {key}")
            elif {eos, eot} == {"all", "last"}:
                why = "with all, the last turn is not the last trained one; needed one for both"
                yield _bad_value(key, what, why, f"set {key}: {eos}")


def _shards(config: Config) -> Iterator[Finding]:
    for entry, spec, _ in dataset_entries(config):
        if spec.shards and (spec.shards_idx or 0) >= spec.shards:
            key, most = f"{entry}.shards_idx", spec.shards - 1
            why = f"found {spec.shards_idx} of {spec.shards} shards, needed 0 to {most}"
            yield _bad_value(key, f"{key} is not a shard", why, f"set {key}: {most}")


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
        yield _bad_value("max_steps", "a stream needs max_steps", why, "set max_steps: 1000")
    if config.val_set_size:
        why = "only a part of the stream is read, so a share of it cannot be evaluated"
        do = "remove val_set_size"
        yield _bad_value("val_set_size", "val_set_size contradicts streaming", why, do)
    if config.dataset_exact_deduplication:
        key, why = "dataset_exact_deduplication", "it removes documents after the stream is read"
        yield _bad_value(key, f"{key} contradicts streaming", why, f"remove {key}")
    specs = [key for key, _, trains in dataset_entries(config) if trains]
    if len(specs) > 1:
        why = f"found {len(specs)} datasets to train on, needed one"
        yield _bad_value("streaming", "streaming needs a single dataset", why,
                         "set streaming: false")  # fmt: skip
    for entry, spec, trains in dataset_entries(config):
        if trains and spec.shards:
            key, why = (
                f"{entry}.shards",
                "a shard is chosen from all records, which must be counted",
            )
            yield _bad_value(key, f"{key} contradicts streaming", why, f"remove {key}")


def _template_variables(config: Config) -> Iterator[Finding]:
    key = "chat_template_kwargs"
    for name in _TEMPLATE_VARIABLES.intersection(config.chat_template_kwargs or ()):
        why = f"found {name}, which the records or the tokenizer set"
        yield _bad_value(key, f"{key} cannot set {name}", why, f"remove {key}.{name}")


def _splits(config: Config) -> Iterator[Finding]:
    for entry, spec, _ in dataset_entries(config):
        if not all(map(_is_split_or_rows, re.split(r"\s*\+\s*", spec.split or "train"))):
            key = f"{entry}.split"
            why = f"{key} is {spec.split!r}; needed a split, or rows of one"
            do = f"set {key}: train, or train[:1000], or train[10%:20%]"
            yield _bad_value(key, f"{spec.split} does not name a split", why, do)


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
            yield _bad_value(key, f"{key}: jinja has no template", why, f"remove {key}")
        if holder.chat_template in TEMPLATES_OF_AXOLOTL:
            key = f"{place}chat_template"
            what = f"the chat template {holder.chat_template} is not implemented"
            why = "found a name of axolotl's own templates; the model's tokenizer has its template"
            yield make_error("unsupported-key", key, what, why, f"set {key}: tokenizer_default")
    key = "default_system_message"
    if not config.default_system_message or not all(spec.type for spec in specs.values()):
        return
    if specs and not chats:
        why = "found no dataset of type chat_template, the only type with system turns"
        yield _bad_value(key, f"{key} has no effect here", why, f"remove {key}")
    elif any(not is_chat(spec) and not is_text(spec) for spec in specs.values()):
        why = "found a dataset whose type has a prompt with a fixed text"
        what = f"{key} has no effect on its records"
        yield make_error("unsupported-key", key, what, why, f"remove {key}")


def _trackers(config: Config) -> Iterator[Finding]:
    """Yield an error for a tracker that is off, and named: axolotl would turn it on."""
    for flag, key in (("use_wandb", "wandb_project"), ("use_mlflow", "mlflow_experiment_name")):
        if getattr(config, flag) is False and getattr(config, key):
            what = f"{key} contradicts {flag}: false"
            why = f"found {flag}: false, and {key}, which turns the tracker on"
            yield _bad_value(key, what, why, f"remove {key}, or set {flag}: true")


_Rule = Callable[[Config], Iterator[Finding]]
_DATASETS = ("datasets", "pretraining_dataset", "test_datasets")
# Each rule, and the keys that it depends on: it is skipped if their values are invalid.
_RULES: tuple[tuple[_Rule, tuple[str, ...]], ...] = (
    (_contradictions, ()),
    (_schedule, ("lr_scheduler", "lr_scheduler_kwargs")),
    (_evaluation, ("val_set_size", "test_datasets")),
    (_adapter, ("adapter",)),
    (
        _quantization,
        ("bnb_config_kwargs", "model_quantization_config", "model_quantization_config_kwargs"),
    ),
    (_mistral_common, _DATASETS),
    (_trained_weights, ("adapter", "unfrozen_parameters", "gradient_checkpointing_kwargs")),
    (_offloading, ("gradient_checkpointing", "activation_offloading")),
    (_dataset_types, ()),
    (_trained_roles, ()),
    (_messages, ("eot_tokens",)),
    (_shards, ()),
    (_streaming, ("streaming_multipack_buffer_size", "max_steps", "val_set_size")),
    (_template_variables, ()),
    (_splits, ()),
    (_templates, ("chat_template_jinja", *_DATASETS)),
    (_trackers, ()),
)


def keys_without_effect(config: Config) -> list[str]:
    """Return a sentence for each reason why some keys of the config have no effect."""
    return [
        f"{reason}, so that {' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect"
        for reason, keys in (*_unused_run_keys(config), *_unused_dataset_keys(config))
        if keys
    ]


def _unused_run_keys(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield each reason with the keys of the run that have no effect because of it."""

    def named(*keys: str) -> list[str]:
        return [key for key in keys if key in config.model_fields_set and getattr(config, key)]

    yield f"lr_scheduler is {config.lr_scheduler}", _unused_by_schedule(config)
    yield f"optimizer is {config.optimizer}", _unused_by_optimizer(config)
    if config.loraplus_lr_ratio is None:
        yield "loraplus_lr_ratio is not set", named("loraplus_lr_embedding")
    else:
        yield "loraplus_lr_ratio is set, as in axolotl", named("weight_decay")
    if config.sample_packing:
        yield "sample_packing is true", named("group_by_length")
    if config.max_steps:
        yield f"max_steps is {config.max_steps}", named("num_epochs")
    if config.adapter is None:
        of_adapter = (key for key in config.model_fields_set if key.startswith(("lora_", "peft_")))
        yield "adapter is not set", sorted(of_adapter)
    if not (config.load_in_4bit or config.adapter == "qlora"):
        yield "the weights are not loaded in 4 bits", named("bnb_config_kwargs")
    if not (config.val_set_size or config.test_datasets):
        yield "there is no evaluation data", named("eval_batch_size", "eval_sample_packing")
    elif not config.sample_packing:
        yield "sample_packing is not true", named("eval_sample_packing")
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing is not true", named("gradient_checkpointing_kwargs")
    if not config.torch_compile:
        yield "torch_compile is not set", named("torch_compile_backend", "torch_compile_mode")
    if not (config.load_best_model_at_end or config.save_strategy == "best"):
        of_best = named("metric_for_best_model")
        yield "neither load_best_model_at_end nor save_strategy: best is set", of_best
    if config.loss_watchdog_threshold is None:
        yield "loss_watchdog_threshold is not set", named("loss_watchdog_patience")
    if not config.dataloader_num_workers:
        yield "dataloader_num_workers is 0", named("dataloader_prefetch_factor")
    if config.save_strategy == "no":
        yield "save_strategy is no", named("save_total_limit", "save_only_model")
    if not (config.fsdp or config.fsdp_config):
        yield "fsdp is not set", named("fsdp_version")
    yield from _unused_tracker_keys(config)
    specs = [spec for _, spec, _ in dataset_entries(config)]
    if not any(map(is_chat, specs)):
        of_chats = named(
            "chat_template", "chat_template_jinja", "chat_template_kwargs", "eot_tokens"
        )
        yield "no dataset has the type chat_template", of_chats
    elif config.chat_template not in (None, "jinja"):
        yield f"chat_template is {config.chat_template}", named("chat_template_jinja")
    if len(config.datasets or config.pretraining_dataset or ()) == 1:
        yield "there is one dataset", named("shuffle_before_merging_datasets")
    if is_streamed(config):
        yield "a stream is read by one process", named("dataset_num_proc", "dataset_processes")
        if not config.shuffle_merged_datasets:
            unused = named("streaming_multipack_buffer_size")
            yield "shuffle_merged_datasets is false", unused
    else:
        yield "streaming is not true", named("streaming_multipack_buffer_size")
    if not (config.pretraining_dataset and config.sample_packing):
        yield "no pretraining_dataset is packed", named("pretrain_multipack_attn")
    if specs and all(map(is_text, specs)):
        yield "all tokens of plain text are trained", named("train_on_inputs")


def _unused_tracker_keys(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield each reason with the keys of trackers and the hub that have no effect because of it."""
    written = [key for key in sorted(config.model_fields_set) if getattr(config, key) is not None]
    on = trackers(config)
    for tracker, prefixes, reason in (
        ("wandb", ("wandb_",), "wandb_mode is disabled" if config.wandb_mode == "disabled"
         else "neither use_wandb nor wandb_project is set"),
        ("mlflow", ("mlflow_", "hf_mlflow_"),
         "neither use_mlflow nor mlflow_experiment_name is set"),
    ):  # fmt: skip
        if tracker not in on:
            unused = [key for key in written if key.startswith(prefixes)]
            off = "wandb_mode" if config.wandb_mode == "disabled" else None
            yield reason, [key for key in unused if key != off]
    if config.hub_model_id is None:
        yield (
            "hub_model_id is not set",
            [k for k in ("hub_strategy", "hub_revision") if k in written],
        )
    elif config.save_strategy == "no" and config.hub_strategy not in (None, "end"):
        yield "save_strategy is no", ["hub_strategy"]


def _unused_by_schedule(config: Config) -> list[str]:
    """Return the keys that the run's learning rate schedule does not read.

    Source: transformers 5.22.2, optimization.py, get_scheduler (2026-11-27).
    """
    name, unused = config.lr_scheduler, []
    if name in ("constant", "reduce_lr_on_plateau"):
        unused = [key for key in ("warmup_steps", "warmup_ratio") if getattr(config, key)]
    if name in ("constant", "constant_with_warmup") and config.lr_scheduler_kwargs:
        unused.append("lr_scheduler_kwargs")
    return unused


def _unused_by_optimizer(config: Config) -> list[str]:
    """Return Adam's keys that the run's optimizer does not read."""
    unread = ["adam_beta1", "adam_beta2"] if config.optimizer in _NO_BETAS else []
    unread += ["adam_epsilon"] if config.optimizer in _NO_EPSILON else []
    return [key for key in unread if getattr(config, key) is not None]


def _unused_dataset_keys(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield each reason with the keys of a dataset entry that have no effect because of it."""
    for key, spec, _ in dataset_entries(config):

        def named(names: Collection[str], key: str = key, spec: DatasetSpec = spec) -> list[str]:
            found = (name for name in sorted(names) if getattr(spec, name) not in (None, False))
            return [f"{key}.{name}" for name in found]

        if spec.type is not None:
            unread = (frozenset() if is_chat(spec) else _CHAT_KEYS) | (
                frozenset() if is_text(spec) else _TEXT_KEYS
            )
            yield f"{key}.type is {type_name(spec)}", named(unread)
        if not key.startswith("pretraining_dataset"):
            yield f"{key} is not in pretraining_dataset", named(["skip"])
        if not spec.shards:
            yield f"{key}.shards is not set", named(["shards_idx"])
        yield "records are read in small batches in any case", named(["preprocess_shards"])
        if is_text(spec) and spec.field:
            yield f"{key}.field is {spec.field}", named(["text_column"])
        if not is_chat(spec):
            continue
        if config.train_on_inputs:
            yield "train_on_inputs trains all roles", named(["roles_to_train"])
        mapped = {"message_field_" + name for name in spec.message_property_mappings or {}}
        fields = mapped & {"message_field_role", "message_field_content"}
        yield f"{key}.message_property_mappings names the same keys", named(fields)
        if spec.chat_template not in (None, "jinja"):
            yield f"{key}.chat_template is {spec.chat_template}", named(["chat_template_jinja"])

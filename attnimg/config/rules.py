"""Check the values of a config: find those that `train` would refuse.

Only the config is read. Rules on datasets are in dataset_rules.py, on optimizer and learning rate
in optimizer_rules.py, on classes in class_rules.py, on qat in qat_rules.py, on attention in
attention.py, types and ranges in schema.py, keys without effect in without_effect.py; `train`
checks what depends on files, the model, the machine or installed packages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnimg.config.class_rules import CLASS_RULES
from attnimg.config.dataset_rules import DATASET_RULES, DATASETS, Rule, bad_value
from attnimg.config.optimizer_rules import OPTIMIZER_RULES
from attnimg.config.preference_rules import PREFERENCE_RULES
from attnimg.config.qat_rules import QAT_RULES
from attnimg.config.schema import (
    BnbArgument,
    Config,
    dataset_entries,
    is_chat,
    make_error,
    offloading_mode,
    role_names,
)
from attnimg.config.weight_patterns import parse_weight_pattern
from attnimg.config.without_effect import unused_evaluation_keys
from attnimg.facts import Finding

# Pairs of keys for the same setting; only one of them may be set.
_EITHER_OR = (
    ("warmup_steps", "warmup_ratio"),
    ("cosine_min_lr_ratio", "eta_min"),
    ("embedding_lr", "embedding_lr_scale"),
    ("loraplus_lr_ratio", "embedding_lr"),
    ("loraplus_lr_ratio", "embedding_lr_scale"),
    ("loraplus_lr_ratio", "lr_groups"),
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
# The values of the arguments of BitsAndBytesConfig.
# Source: transformers 5.22.2, utils/quantization_config.py, BitsAndBytesConfig (2026-11-27)
_DTYPES = ("bfloat16", "float16", "float32")
BNB_VALUES: dict[BnbArgument, tuple[bool | str, ...]] = {
    "bnb_4bit_compute_dtype": _DTYPES,
    "bnb_4bit_quant_type": ("nf4", "fp4"),
    "bnb_4bit_use_double_quant": (True, False),
    "bnb_4bit_quant_storage": ("uint8", *_DTYPES),
}
# Settings of accelerate, and their values that change no batch. Without even_batches, accelerate
# does not repeat rows at the end of an epoch; attnimg's rows divide evenly in any case.
# Source: transformers 5.22.2, trainer_pt_utils.py, AcceleratorConfig (2026-11-27)
_ACCELERATOR: dict[str, tuple[bool, ...]] = {
    "split_batches": (False,),
    "dispatch_batches": (False,),
    "even_batches": (True, False),
    "use_seedable_sampler": (True,),
    "use_configured_state": (False,),
    "non_blocking": (True, False),
}
# Fields of a model's configuration -> what decides them in a run.
_DECIDED_ELSEWHERE = {
    "dtype": "bf16 and fp16 decide the precision",
    "torch_dtype": "bf16 and fp16 decide the precision",
    "architectures": "the key model_type names the class of the model",
    "model_type": "the model's own config.json decides it",
    "attn_implementation": "the key attn_implementation names the backend",
    "experts_implementation": "the key experts_implementation decides it",
    "quantization_config": "load_in_4bit, load_in_8bit and model_quantization_config decide it",
    "bos_token_id": "the tokenizer decides it, with the key special_tokens",
    "eos_token_id": "the tokenizer decides it, with the key special_tokens",
    "pad_token_id": "the tokenizer decides it, with the key special_tokens",
}
# Keys that change a tokenizer or its template.
_NOT_WITH_MISTRAL = (
    "special_tokens", "tokens", "added_tokens_overrides", "eot_tokens", "chat_template",
    "chat_template_jinja", "tokenizer_type", "tokenizer_legacy",
)  # fmt: skip


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
            yield bad_value(second, f"{second} contradicts {first}", why, do)
    if None not in (getattr(config, key) for key in _RENAMED):
        new, old = _RENAMED
        why = f"found both; {old} is the older name of {new}"
        yield bad_value(old, f"{old} contradicts {new}", why, f"remove {old}")
    if config.float16 and not (config.fp16 or config.bf16):
        why = "found bf16: false and no fp16; weights, gradients and optimizer would be in float16 "
        why += "without loss scaling, where small gradients and AdamW's epsilon are 0"
        do = "set fp16: true, which computes in float16 and scales the loss"
        what = "float16 is not implemented without fp16"
        yield make_error("unsupported-key", "float16", what, why, do)
    if config.fp16 and config.bf16 in (True, "full"):
        why = "found fp16: true and bf16: true, needed one of them"
        yield bad_value("fp16", "fp16 contradicts bf16", why, "keep bf16 or fp16")
    for verb in ("eval", "save"):
        strategy = getattr(config, f"{verb}_strategy")
        if strategy not in ("no", "epoch", "best"):
            continue
        if getattr(config, f"{verb}_steps") or getattr(config, f"{verb}s_per_epoch"):
            key = f"{verb}_strategy"
            what = f"{key}: {strategy} contradicts {verb}_steps or {verb}s_per_epoch"
            why = f"{verb}_steps and {verb}s_per_epoch need {key}: steps, or no {key}"
            yield bad_value(key, what, why, f"remove {key}")


def _evaluation(config: Config) -> Iterator[Finding]:
    """Yield errors: evaluation without documents, and a val_set_size that is not valid."""
    size = config.val_set_size
    if size == 1 or (size > 1 and not size.is_integer()):
        taken = "all documents (1 is 100 %)" if size == 1 else "a part of a document"
        why = f"it is {taken}; needed a share below 1, or a whole number of documents from 2 on"
        what = f"val_set_size {size:g} is not valid"
        yield bad_value("val_set_size", what, why, "set val_set_size: 0.05")
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
        yield bad_value("save_strategy", what, why, do)
    if size or config.test_datasets:
        if stopping and config.eval_strategy == "no":
            key, why = "eval_strategy", "it needs the validation loss, which is never computed"
            yield bad_value(key, f"{key}: no contradicts {stopping}", why,
                          f"remove {key}")  # fmt: skip
        return
    why = "found val_set_size: 0 and no test_datasets"
    unused = unused_evaluation_keys(config)
    requested = [
        key
        for key in ("eval_steps", "early_stopping_patience", "eval_strategy",
                    "load_best_model_at_end")
        if getattr(config, key) not in (None, False, "no") and key not in unused
    ]  # fmt: skip
    for key in requested[:1]:
        do = f"set val_set_size: 0.05, or remove {key}"
        yield bad_value(key, f"{key} needs evaluation data", why, do)
    if config.lr_scheduler == "reduce_lr_on_plateau":
        what = "lr_scheduler: reduce_lr_on_plateau needs evaluation data"
        yield bad_value("lr_scheduler", what, why, "set val_set_size: 0.05")
    if config.save_strategy == "best":
        what = "save_strategy: best needs evaluation data"
        do = "set val_set_size: 0.05, or remove save_strategy"
        yield bad_value("save_strategy", what, why, do)


def _adapter(config: Config) -> Iterator[Finding]:
    if config.adapter == "qlora" and (config.load_in_4bit is False or config.load_in_8bit):
        key = "load_in_8bit" if config.load_in_8bit else "load_in_4bit"
        yield bad_value(key, f"{key} contradicts adapter: qlora",
                      "qlora needs weights that are loaded in 4 bits",
                      f"remove {key}, or set adapter: lora")  # fmt: skip
    targets, layers = config.lora_target_modules or [], config.peft_layers_to_transform
    is_pattern = isinstance(targets, str) and targets.lower() != "all-linear"
    if layers and (is_pattern or any("." in name for name in targets)):
        key = "peft_layers_to_transform"
        yield bad_value(key, f"{key} needs short names in lora_target_modules",
                         f"found {targets}; PEFT compares {key} with the last part of names",
                         f"remove {key}")  # fmt: skip
    if config.peft_layers_pattern and not config.peft_layers_to_transform:
        key, needed = "peft_layers_pattern", "peft_layers_to_transform"
        yield bad_value(key, f"{key} needs {needed}", f"found no {needed}", f"remove {key}")
    if config.adapter is None and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        fitting = "qlora" if config.load_in_4bit else "lora"
        yield bad_value(key, f"{key} needs an adapter",
                      f"found no adapter; weights in {key[8:]} cannot be trained",
                      f"set adapter: {fitting}, or remove {key}")  # fmt: skip
    if config.adapter is None and config.loraplus_lr_ratio:
        key, why = (
            "loraplus_lr_ratio",
            "it is the ratio of the learning rates of LoRA's two weights",
        )
        do = f"set adapter: lora, or remove {key}"
        yield bad_value(key, f"{key} needs an adapter", why, do)
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        key = "lora_target_modules"
        yield bad_value(key, f"{key} cannot include lm_head",
                      "the loss reads lm_head's own weight, so its adapter would not be trained",
                      "move lm_head to lora_modules_to_save")  # fmt: skip


def _quantization(config: Config) -> Iterator[Finding]:
    """Yield errors: arguments of a quantization that transformers or bitsandbytes refuses."""
    for argument, value in (config.bnb_config_kwargs or {}).items():
        if type(value) in (bool, str) and value in BNB_VALUES[argument]:
            continue
        choices = ", ".join(str(v).lower() for v in BNB_VALUES[argument])
        yield bad_value("bnb_config_kwargs", f"bnb_config_kwargs.{argument} has an invalid value",
                         f"found {value!r}; needed {choices}",
                         f"remove bnb_config_kwargs, or correct {argument} in it")  # fmt: skip
    yield from _quantized_experts(config)
    name, arguments = config.model_quantization_config, config.model_quantization_config_kwargs
    key = "model_quantization_config_kwargs"
    if name and arguments != {"dequantize": True}:
        yield bad_value(key, f"{name} is only implemented with dequantize: true",
                         f"found {key}: {arguments or 'none'}; weights that stay quantized by "
                         f"{name} can't be trained, and an adapter on them is not tested",
                         f"set {key}: {{dequantize: true}}")  # fmt: skip
    elif arguments and not name:
        yield bad_value(key, f"{key} needs model_quantization_config", "found none",
                         f"remove {key}")  # fmt: skip


def _quantized_experts(config: Config) -> Iterator[Finding]:
    """Yield errors: experts that can't be quantized, or not together with sharding."""
    key = "quantize_moe_experts"
    if not config.quantize_moe_experts:
        return
    if not (config.load_in_4bit or config.load_in_8bit or config.adapter == "qlora"):
        yield bad_value(key, f"{key} needs weights in 4 or 8 bits",
                         "found neither load_in_4bit nor load_in_8bit",
                         f"set adapter: qlora, or remove {key}")  # fmt: skip
    sharding = [name for name in ("deepspeed", "fsdp", "fsdp_config") if getattr(config, name)]
    if sharding:
        yield bad_value(key, f"{key} contradicts {sharding[0]}",
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
        yield bad_value(key, f"{key} contradicts tokenizer_use_mistral_common", why,
                         f"remove {key}, or remove tokenizer_use_mistral_common")  # fmt: skip


def _model_fields(config: Config) -> Iterator[Finding]:
    """Yield errors: fields of the model's configuration that would have no effect in a run."""
    key = "overrides_of_model_config"
    for name in config.overrides_of_model_config or {}:
        why = _DECIDED_ELSEWHERE.get(name.lstrip("_"), "it is private" if name[0] == "_" else "")
        if why:
            do = f"remove {key}.{name}"
            yield bad_value(key, f"{key} can't set {name}", f"it has no effect: {why}", do)


def _trained_weights(config: Config) -> Iterator[Finding]:
    """Yield errors: weights that can't be trained, or would be lost, with the config's keys."""
    if config.unfrozen_parameters:
        key = "unfrozen_parameters"
        arguments = config.gradient_checkpointing_kwargs or {}
        if config.adapter:
            yield bad_value(key, f"{key} contradicts adapter: {config.adapter}",
                             "an adapter freezes the model's weights, and is saved without them; "
                             f"axolotl compares {key} with PEFT's names of weights, which begin "
                             "with base_model, so that patterns for the model freeze the adapter",
                             f"remove {key}: an adapter trains only its own weights, and only those"
                             " on the language model")  # fmt: skip
        elif arguments.get("use_reentrant") is True:
            why = "reentrant checkpointing loses the gradients of a partly frozen model"
            do = "set gradient_checkpointing_kwargs: {use_reentrant: false}"
            yield bad_value(key, f"{key} contradicts use_reentrant: true", why, do)
        elif (config.fsdp or config.fsdp_config or config.deepspeed) and any(
            parse_weight_pattern(pattern)[1] for pattern in config.unfrozen_parameters
        ):
            names = ("deepspeed", "fsdp", "fsdp_config")
            sharding = " and ".join(name for name in names if getattr(config, name))
            why = "found a pattern with rows; no process has all rows of a sharded weight"
            yield bad_value(key, f"{key} can't name rows with {sharding}", why,
                             f"remove {sharding}, or name whole weights in {key}")  # fmt: skip
    if config.reinit_weights and config.adapter:
        yield bad_value("reinit_weights", f"reinit_weights contradicts adapter: {config.adapter}",
                         "an adapter is saved without the model's weights, which would be random "
                         "and lost", "remove reinit_weights, or remove adapter")  # fmt: skip


def _offloading(config: Config) -> Iterator[Finding]:
    """Yield an error for activation_offloading without checkpointed layers, as axolotl does."""
    key = "activation_offloading"
    if config.activation_offloading and not config.gradient_checkpointing:
        why = "it moves the activations of checkpointed layers; found gradient_checkpointing: false"
        do = f"set gradient_checkpointing: true, or remove {key}"
        yield bad_value(key, f"{key} needs gradient_checkpointing", why, do)
    arguments = config.gradient_checkpointing_kwargs or {}
    if offloading_mode(config) and arguments.get("use_reentrant"):
        key = "gradient_checkpointing_kwargs"
        why = "found use_reentrant: true, which runs a backward pass inside the backward pass"
        do = f"set {key}: {{use_reentrant: false}}"
        yield bad_value(key, "activation_offloading contradicts use_reentrant", why, do)


def _accelerator(config: Config) -> Iterator[Finding]:
    """Yield errors: settings of accelerate with which the batches would be others."""
    key = "accelerator_config"
    for name, value in (config.accelerator_config or {}).items():
        known = _ACCELERATOR.get(name, ())
        if name == "gradient_accumulation_kwargs" and isinstance(value, dict):
            name, known = f"{name}.sync_each_batch", (True, False)
            others = set(value) - {"sync_each_batch"}
            value = f"another key, {min(others)}" if others else value.get("sync_each_batch")
        if value is not None and not (isinstance(value, bool) and value in known):
            needed = " or ".join(str(v).lower() for v in known) or "no such setting"
            yield bad_value(key, f"{key}.{name} has a value that is not implemented",
                             f"found {value}; needed {needed}", f"remove {key}")  # fmt: skip


def _trackers(config: Config) -> Iterator[Finding]:
    """Yield an error for a tracker that is turned off, and on by its project or in report_to.

    axolotl turns on a tracker with a project.
    """
    for flag, key in (("use_wandb", "wandb_project"), ("use_mlflow", "mlflow_experiment_name")):
        if getattr(config, flag) is False and getattr(config, key):
            what = f"{key} contradicts {flag}: false"
            why = f"found {flag}: false, and {key}, which turns the tracker on"
            yield bad_value(key, what, why, f"remove {key}, or set {flag}: true")
    for name in config.report_to or ():
        if getattr(config, flag := f"use_{name}") is False:
            what, why = f"report_to contradicts {flag}: false", f"found report_to: {name}"
            yield bad_value("report_to", what, why, f"remove report_to, or set {flag}: true")


# Each rule, and the keys that it depends on: it is skipped if their values are invalid.
_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_contradictions, ()),
    *OPTIMIZER_RULES,
    (_evaluation, ("val_set_size", "test_datasets")),
    (_adapter, ("adapter",)),
    (
        _quantization,
        ("bnb_config_kwargs", "model_quantization_config", "model_quantization_config_kwargs"),
    ),
    (_mistral_common, DATASETS),
    *CLASS_RULES,
    (_model_fields, ()),
    (_trained_weights, ("adapter", "unfrozen_parameters", "gradient_checkpointing_kwargs")),
    (_offloading, ("gradient_checkpointing", "activation_offloading")),
    *DATASET_RULES,
    *PREFERENCE_RULES,
    *QAT_RULES,
    (_accelerator, ("accelerator_config",)),
    (_trackers, ()),
)

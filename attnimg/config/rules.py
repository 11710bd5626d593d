"""Check the values of a config: those that `train` would refuse, and keys without effect.

Only the config is read. Rules on attention are in attention.py, types and ranges in schema.py;
`train` checks what depends on files, the model, the machine or installed packages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches

from attnimg.config.schema import (
    DATASET_TYPES,
    Config,
    DatasetSpec,
    dataset_entries,
    is_chat,
    is_text,
    make_error,
    make_warning,
    offloading_mode,
    role_names,
)
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
# Schedules that need an argument: its possible names, and an example value.
SCHEDULER_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), "1e-6"),
    "warmup_stable_decay": (("num_decay_steps",), "10"),
}
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
     "roles", "roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"}
)  # fmt: skip
_TEXT_KEYS = frozenset({"field", "text_column"})


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
    targets = config.lora_target_modules or []
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        key = "lora_target_modules"
        yield _bad_value(key, f"{key} cannot include lm_head",
                      "the loss reads lm_head's own weight, so its adapter would not be trained",
                      "move lm_head to lora_modules_to_save")  # fmt: skip


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
        if spec.type is None or spec.type in DATASET_TYPES:
            continue
        similar = get_close_matches(spec.type, DATASET_TYPES, n=1)
        # Source: axolotl 067b021c, utils/schemas/validation.py:52 (2026-11-27)
        similar = ["chat_template"] if spec.type.startswith("sharegpt") else similar
        key = f"{entry}.type"
        why = f"{key} is {spec.type}, needed one of {', '.join(DATASET_TYPES)}"
        do = f"set {key}: {' or '.join(similar or DATASET_TYPES[:-1])}"
        yield _bad_value(key, f"unknown dataset type {spec.type!r}", why, do)


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
    """Yield errors: chat_template: jinja without a template, and an unused system message."""
    specs = {f"{key}.": spec for key, spec, _ in dataset_entries(config)}
    chats = {place: spec for place, spec in specs.items() if is_chat(spec)}
    holders: dict[str, Config | DatasetSpec] = {"": config, **chats} if chats else {}
    for place, holder in holders.items():
        if holder.chat_template == "jinja" and not holder.chat_template_jinja:
            key = f"{place}chat_template"
            why = f"found {key}: jinja and no {key}_jinja, which would contain the template"
            yield _bad_value(key, f"{key}: jinja has no template", why, f"remove {key}")
    key = "default_system_message"
    if not config.default_system_message or not all(spec.type for spec in specs.values()):
        return
    if specs and not chats:
        why = "found no dataset of type chat_template, the only type with system turns"
        yield _bad_value(key, f"{key} has no effect here", why, f"remove {key}")
    elif any((spec.type or "").startswith("alpaca") for spec in specs.values()):
        why = "found a dataset of type alpaca, whose prompt has a fixed text"
        what = f"{key} has no effect on alpaca records"
        yield make_error("unsupported-key", key, what, why, f"remove {key}")


_Rule = Callable[[Config], Iterator[Finding]]
_DATASETS = ("datasets", "pretraining_dataset", "test_datasets")
# Each rule, and the keys that it depends on: it is skipped if their values are invalid.
_RULES: tuple[tuple[_Rule, tuple[str, ...]], ...] = (
    (_contradictions, ()),
    (_schedule, ("lr_scheduler", "lr_scheduler_kwargs")),
    (_evaluation, ("val_set_size", "test_datasets")),
    (_adapter, ("adapter",)),
    (_offloading, ("gradient_checkpointing", "activation_offloading")),
    (_dataset_types, ()),
    (_trained_roles, ()),
    (_splits, ()),
    (_templates, ("chat_template_jinja", *_DATASETS)),
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
    specs = [spec for _, spec, _ in dataset_entries(config)]
    if not any(map(is_chat, specs)):
        of_chats = named("chat_template", "chat_template_jinja", "eot_tokens")
        yield "no dataset has the type chat_template", of_chats
    elif config.chat_template not in (None, "jinja"):
        yield f"chat_template is {config.chat_template}", named("chat_template_jinja")
    if specs and all(map(is_text, specs)):
        yield "all tokens of plain text are trained", named("train_on_inputs")


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
            return [f"{key}.{name}" for name in sorted(names) if getattr(spec, name) is not None]

        if spec.type is not None:
            unread = (frozenset() if is_chat(spec) else _CHAT_KEYS) | (
                frozenset() if is_text(spec) else _TEXT_KEYS
            )
            yield f"{key}.type is {spec.type}", named(unread)
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

"""Warn of keys that have no effect in a run, or another one than in axolotl.

Only the config is read. rules.py has the values that are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnimg.config.qat_rules import changed_settings
from attnimg.config.schema import (
    Config,
    DatasetSpec,
    dataset_entries,
    is_chat,
    is_streamed,
    is_text,
    make_warning,
    trackers,
    trains_preferences,
    type_name,
)
from attnimg.facts import Finding

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


def value_warnings(config: Config, failed: Collection[str]) -> Iterator[Finding]:
    """Yield a warning for each value that is not used, or is used in another way than in axolotl.

    Args:
        config: the valid part of the config.
        failed: the keys that are not in it because their values are invalid.
    """
    yield from _hints(config)
    if not {"val_set_size", "test_datasets"} & set(failed):
        for key in unused_evaluation_keys(config):
            what = f"{key} has no effect: there is no evaluation data"
            do = f"set val_set_size: 0.05, or remove {key}"
            yield make_warning("without-effect", key, what, do)
    if config.eta_min:
        what = (
            "the cosine schedule ends at eta_min here; axolotl 0.19 does not read it and ends at 0"
        )
        yield make_warning("done-otherwise", "eta_min", what, "remove eta_min")
    if config.float16 and (config.fp16 or config.bf16):
        what = "float16 has no effect: bf16 and fp16 decide the precision"
        yield make_warning("without-effect", "float16", what, "remove float16")
    if config.peft_init_lora_weights is False:
        key = "peft_init_lora_weights"
        what = f"{key}: false has no effect, as in axolotl: adapters start without an effect"
        yield make_warning("without-effect", key, what, f"remove {key}")
    yield from _rounding(config)
    for key, value, same in (("activation_offloading", "disk", "true"),
                             ("gradient_checkpointing", "offload_disk", "offload")):  # fmt: skip
        if getattr(config, key) == value:
            what = f"{key}: {value} moves activations to CPU memory, as in axolotl, not to a disk"
            yield make_warning("done-otherwise", key, what, f"set {key}: {same}")


def _rounding(config: Config) -> Iterator[Finding]:
    """Yield a warning for a qat that begins after the last step."""
    if config.qat is None or not config.max_steps:
        return
    first = config.qat.fake_quant_after_n_steps or 0
    if first >= config.max_steps:
        what = (
            f"qat has no effect: it begins after {first} steps, and the run has {config.max_steps}"
        )
        settings = changed_settings(config.qat, {"fake_quant_after_n_steps": 0})
        yield make_warning("without-effect", "qat", what, f"set qat: {settings}, or remove qat")


def _hints(config: Config) -> Iterator[Finding]:
    """Yield a warning for each value that only changes speed or memory, and is not used."""
    name = config.experts_implementation
    if name in ("scattermoe", "sonicmoe"):
        yield make_warning(
            "hint-not-used", "experts_implementation",
            f"experts_implementation: {name} is not used: the kernel would compute the same "
            "faster; transformers' grouped_mm runs instead",
            "set experts_implementation: grouped_mm; if memory does not suffice, lower "
            "micro_batch_size",
        )  # fmt: skip
    if config.use_kernels and config.torch_compile:
        yield make_warning(
            "hint-not-used", "use_kernels",
            "use_kernels is not used: the hub's kernels do not support torch_compile, which "
            "compiles the model's own layers",
            "remove use_kernels, or remove torch_compile",
        )  # fmt: skip
    elif config.use_kernels and config.liger_rms_norm:
        yield make_warning(
            "hint-not-used", "use_kernels",
            "use_kernels is not used for RMSNorm, which liger_rms_norm replaces",
            "remove use_kernels, or remove liger_rms_norm",
        )  # fmt: skip


def unused_evaluation_keys(config: Config) -> list[str]:
    """Return the evaluation keys that have no effect because there is no evaluation data.

    Many configs have evals_per_epoch without such data. eval_steps and eval_strategy request
    evaluations, unless the config turns them off with val_set_size: 0.
    Source: axolotl 0.19.0, utils/config/__init__.py, normalize_config (2026-11-27).
    """
    if config.val_set_size or config.test_datasets:
        return []
    keys = ["evals_per_epoch"]
    if "val_set_size" in config.model_fields_set:
        keys += ["eval_steps", "eval_strategy"]
    return [key for key in keys if getattr(config, key) not in (None, 0, "no")]


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
    if trains_preferences(config):
        yield "TRL turns dropout off in preference training", named("lora_dropout")
        yield f"rl: {config.rl} trains whole answers", named("eot_tokens")
        yield "one process reads preference data", named("dataset_num_proc", "dataset_processes")
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

        if not trains_preferences(config):
            yield "rl is not set", named(["field_chosen", "field_rejected"])
        if spec.type is not None and not trains_preferences(config):
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

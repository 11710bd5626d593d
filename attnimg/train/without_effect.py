"""Find the keys of a config that have no effect in its run, for a warning that names them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from attnimg.config.schema import Config, DatasetSpec
from attnimg.train.data.sources import entries
from attnimg.train.data.types import is_chat, is_text

# Optimizers that get no betas, or no epsilon. Source: transformers 5.22.2, trainer_optimizer.py,
# _get_adafactor, _get_bitsandbytes_optimizer, _get_sgd, _get_adagrad, _get_rmsprop (2026-11-27)
_NO_BETAS = frozenset({"adafactor", "sgd", "adagrad", "rmsprop"})
_NO_EPSILON = _NO_BETAS | {"lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"}
# Keys of a dataset entry that only one kind of dataset type reads.
_CHAT_KEYS = frozenset(
    {"field_messages", "message_field_role", "message_field_content", "message_property_mappings",
     "roles", "roles_to_train", "train_on_eos", "chat_template", "chat_template_jinja"}
)  # fmt: skip
_TEXT_KEYS = frozenset({"field", "text_column"})


def without_effect(config: Config) -> list[str]:
    """Return a sentence for each reason why keys that the config sets have no effect."""
    return [
        f"{reason}, so that {' and '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect"
        for reason, keys in (*_of_run(config), *_of_entries(config))
        if keys
    ]


def _of_run(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield a reason and the keys of the run that are not read for it."""

    def named(*keys: str) -> list[str]:
        return [key for key in keys if key in config.model_fields_set and getattr(config, key)]

    yield f"lr_scheduler is {config.lr_scheduler}", unused_by_schedule(config)
    yield f"optimizer is {config.optimizer}", unused_by_optimizer(config)
    if config.max_steps:
        yield f"max_steps is {config.max_steps}", named("num_epochs")
    if config.adapter is None:
        of_adapter = (key for key in config.model_fields_set if key.startswith(("lora_", "peft_")))
        yield "adapter is not set", sorted(of_adapter)
    if not (config.val_set_size or config.test_datasets):
        yield "there is nothing to evaluate on", named("eval_batch_size", "eval_sample_packing")
    elif not config.sample_packing:
        yield "sample_packing is not true", named("eval_sample_packing")
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing is not true", named("gradient_checkpointing_kwargs")
    if not config.torch_compile:
        yield "torch_compile is not set", named("torch_compile_backend", "torch_compile_mode")
    if config.save_strategy == "no":
        yield "save_strategy is no", named("save_total_limit", "save_only_model")
    if not (config.fsdp or config.fsdp_config):
        yield "fsdp is not set", named("fsdp_version")
    specs = [spec for _, spec, _ in entries(config)]
    if not any(map(is_chat, specs)):
        of_chats = named("chat_template", "chat_template_jinja", "eot_tokens")
        yield "no dataset has the type chat_template", of_chats
    elif config.chat_template not in (None, "jinja"):
        yield f"chat_template is {config.chat_template}", named("chat_template_jinja")
    if specs and all(map(is_text, specs)):
        yield "all tokens of running text are trained", named("train_on_inputs")


def unused_by_schedule(config: Config) -> list[str]:
    """Return the keys that the run's learning rate schedule does not read.

    Source: transformers 5.22.2, optimization.py, get_scheduler (2026-11-27).
    """
    name, unused = config.lr_scheduler, []
    if name in ("constant", "reduce_lr_on_plateau"):
        unused = [key for key in ("warmup_steps", "warmup_ratio") if getattr(config, key)]
    if name in ("constant", "constant_with_warmup") and config.lr_scheduler_kwargs:
        unused.append("lr_scheduler_kwargs")
    return unused


def unused_by_optimizer(config: Config) -> list[str]:
    """Return Adam's keys that the run's optimizer does not read."""
    unread = ["adam_beta1", "adam_beta2"] if config.optimizer in _NO_BETAS else []
    unread += ["adam_epsilon"] if config.optimizer in _NO_EPSILON else []
    return [key for key in unread if getattr(config, key) is not None]


def _of_entries(config: Config) -> Iterator[tuple[str, list[str]]]:
    """Yield a reason and the keys of a dataset entry that are not read for it."""
    for key, spec, _ in entries(config):

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

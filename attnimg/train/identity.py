"""Build the identity of a run: the keys of its config; hashes of model, tokenizer, data, kernels.

Each checkpoint has the identity of its run. A run that resumes from it must have the same, except
for CHANGEABLE keys. Each key of the config is in one of the sets below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config, DatasetSpec, is_chat
from attnimg.facts import RunContext
from attnimg.train.distributed import world_size
from attnimg.train.model_files import model_of, tokenizer_of

if TYPE_CHECKING:
    from attnimg.train.data import SourceFigures
    from attnimg.train.receipt import RunFacts

# Compared by value: a different value results in a different model.
BY_VALUE = frozenset(
    {
        "model_type", "tokenizer_type", "special_tokens", "tokens", "scaling_softmax",
        "shuffle_merged_datasets", "val_set_size", "sequence_len", "excess_length_strategy",
        "sample_packing", "pad_to_sequence_len", "batch_flattening", "train_on_inputs",
        "chat_template", "chat_template_jinja", "default_system_message", "eot_tokens",
        "micro_batch_size", "gradient_accumulation_steps", "optimizer", "lr_scheduler",
        "lr_scheduler_kwargs", "cosine_min_lr_ratio", "warmup_steps", "warmup_ratio",
        "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
        "bf16", "fp16", "tf32", "load_in_4bit", "load_in_8bit",
        "adapter", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "lora_target_linear", "lora_modules_to_save", "lora_fan_in_fan_out", "peft_use_dora",
        "peft_use_rslora", "early_stopping_patience",
        "fsdp", "fsdp_config", "fsdp_version", "deepspeed", "rl", "context_parallel_size",
    }
)  # fmt: skip

# Compared by content: the files of model and tokenizer, the documents' tokens, the kernel that
# runs. Moved folders and renamed data files are the same.
BY_CONTENT = frozenset(
    {
        "base_model", "revision_of_model", "tokenizer_config", "datasets", "pretraining_dataset",
        "test_datasets", "attn_implementation",
    }
)  # fmt: skip

# Compared by value only where evaluation controls early stopping or the learning rate; so is the
# content of test_datasets.
EVALUATION_KEYS = frozenset(
    {"eval_strategy", "eval_steps", "evals_per_epoch", "eval_sample_packing"}
)

# May change: the new value is used from the checkpoint on.
CHANGEABLE = frozenset({"learning_rate", "max_steps", "num_epochs"})

# Not compared: paths, logging, saving and speed, which do not change the trained weights.
NOT_COMPARED = frozenset(
    {
        "trust_remote_code", "attn_supports_packing", "attn_uses_flash_lib",
        "attn_needs_dtype_cast", "attn_strict", "attn_forward_only_ok", "attn_known_bad",
        "attn_check_steps",
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "eval_batch_size",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "output_dir", "logging_steps",
        "save_strategy", "save_steps", "saves_per_epoch", "save_total_limit", "save_only_model",
        "resume_from_checkpoint", "auto_resume_from_checkpoints", "ddp_timeout",
        "ddp_find_unused_parameters", "dataloader_num_workers", "dataloader_pin_memory", "strict",
    }
)  # fmt: skip


def identity_of(
    config: Config,
    *,
    run: RunFacts,
    tokenizer: Any,
    figures: tuple[SourceFigures, ...],
    rows: object,
    tokens: object,
) -> dict[str, Any]:
    """Return the identity of a run, as it is saved in checkpoints.

    Args:
        config: the validated run.
        run: has the attention, kernels and precision.
        tokenizer: as `load_tokenizer` returns it.
        figures: statistics of the sources.
        rows: number of training rows, packed where the run packs.
        tokens: number of tokens in them.
    """
    return {
        **settings_of(config),
        **attention_and_precision(run.backend, run.context),
        **data_of(config, figures, tokenizer),
        "tokenizer": tokenizer_of(config),
        "kernels": run.kernels,
        "rows": rows,
        "tokens": tokens,
    }


def settings_of(config: Config) -> dict[str, Any]:
    """Return the part of a run's identity that is known before anything is loaded."""
    return {"keys": keys_of(config), "model": model_of(config), "processes": world_size()}


def keys_of(config: Config) -> dict[str, Any]:
    """Return the keys that are compared by value, and those that may change."""
    names = BY_VALUE | CHANGEABLE
    if evaluation_decides(config.model_dump()):
        names |= EVALUATION_KEYS
    if not config.adapter:
        names = frozenset(n for n in names if not n.startswith(("lora_", "peft_use_")))
    values = config.model_dump(mode="json", include=set(names))
    if config.adapter == "qlora":
        values["load_in_4bit"] = True
    if isinstance(config.deepspeed, str):
        values["deepspeed"] = _json_of(config.deepspeed)
    return {key: _plain(key, value) for key, value in sorted(values.items())}


def evaluation_decides(keys: Mapping[str, Any]) -> bool:
    """Return whether the evaluation loss controls early stopping or the learning rate."""
    plateau = keys.get("lr_scheduler") == "reduce_lr_on_plateau"
    return plateau or bool(keys.get("early_stopping_patience"))


def _plain(key: str, value: Any) -> Any:
    """Return a value; None for a false flag or an empty list where the default is None."""
    unset = Config.model_fields[key].default is None and (value is False or value in ([], {}))
    return None if unset else value


def attention_and_precision(backend: str, context: RunContext) -> dict[str, str]:
    """Return the attention backend and the precision of a run."""
    mixed = " autocast" if context.autocast else ""
    return {"attention": backend, "precision": context.dtype + mixed}


def data_of(
    config: Config, figures: tuple[SourceFigures, ...], tokenizer: Any
) -> dict[str, list[dict[str, Any]]]:
    """Return each source with the hash of its documents' tokens and labels.

    Returns:
        The sources of training under "data", those of test_datasets under "evaluation".
    """
    specs = {
        f"{name}[{number}]": spec
        for name in ("datasets", "pretraining_dataset", "test_datasets")
        for number, spec in enumerate(getattr(config, name) or ())
    }
    found: dict[str, list[dict[str, Any]]] = {"data": [], "evaluation": []}
    for source in figures:
        part = "evaluation" if source.key.startswith("test_datasets") else "data"
        spec = specs[source.key]
        found[part].append(
            {
                "key": source.key,
                "spec": spec.model_dump(mode="json", exclude_none=True),
                "dated": _dated(config, spec, source.key, tokenizer),
                **{name: getattr(source, name)
                   for name in ("content", "read", "documents", "tokens")},
            }
        )  # fmt: skip
    return found


def _dated(config: Config, spec: DatasetSpec, key: str, tokenizer: Any) -> str | None:
    """Return a hash of template and tokenizer where the template writes the current date.

    Llama 3.2's does. None where the same records have the same tokens on any day.
    """
    from attnimg.train.data import choose_chat_template

    if not is_chat(spec):
        return None
    template = choose_chat_template(config, tokenizer, spec=spec, key=key)
    if "strftime_now" not in json.dumps(template):
        return None
    text = json.dumps([template, tokenizer.backend_tokenizer.to_str()])
    return hashlib.sha256(text.encode()).hexdigest()


def _json_of(path: str) -> Any:
    """Return the content of a JSON file; the path itself where it can't be read."""
    try:
        return json.loads(Path(path).expanduser().read_bytes())
    except (OSError, ValueError):
        return path

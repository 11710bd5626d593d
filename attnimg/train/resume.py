"""Compare a run with the checkpoint it resumes from: report allowed changes, refuse the others.

Each checkpoint has the identity of its run: the keys of its config; hashes of model, tokenizer,
data and kernels. A run that resumes from it must have the same, except for CHANGEABLE keys. Each
key of the config is in one of the sets below.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from attnimg.config.schema import Config, DatasetSpec, is_chat
from attnimg.errors import AttnimgError, KernelError, set_backend
from attnimg.run_facts import RunContext
from attnimg.train import checkpoint as checkpoints
from attnimg.train.distributed import world_size
from attnimg.train.lora import find_targets
from attnimg.train.model import load_without_weights
from attnimg.train.model_files import hash_model, hash_tokenizer
from attnimg.train.saved_adapter import hash_reference_adapter

if TYPE_CHECKING:
    from attnimg.train.data import SourceFigures
    from attnimg.train.records import RunFacts

# Compared by value: a different value results in a different model.
BY_VALUE = frozenset(
    {
        "model_type", "tokenizer_type", "special_tokens", "tokens", "added_tokens_overrides",
        "scaling_softmax",
        "streaming", "streaming_multipack_buffer_size", "pretrain_multipack_attn",
        "shuffle_merged_datasets", "shuffle_before_merging_datasets",
        "dataset_exact_deduplication", "val_set_size", "sequence_len", "min_sample_len",
        "excess_length_strategy", "chat_template_kwargs", "group_by_length",
        "sample_packing", "pad_to_sequence_len", "batch_flattening", "train_on_inputs",
        "chat_template", "chat_template_jinja", "default_system_message", "eot_tokens",
        "micro_batch_size", "gradient_accumulation_steps", "optimizer", "lr_scheduler",
        "lr_scheduler_kwargs", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "eta_min",
        "lr_quadratic_warmup", "neftune_noise_alpha", "embedding_lr", "embedding_lr_scale",
        "lr_groups", "optim_args",
        "loraplus_lr_ratio", "loraplus_lr_embedding", "warmup_steps", "warmup_ratio",
        "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
        "bf16", "fp16", "tf32", "load_in_4bit", "load_in_8bit",
        "adapter", "lora_model_dir", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules",
        "lora_target_linear", "lora_modules_to_save", "lora_fan_in_fan_out", "peft_use_dora",
        "peft_use_rslora", "lora_rank_pattern", "lora_alpha_pattern",
        "peft_init_lora_weights", "peft_layers_to_transform", "peft_layers_pattern",
        "lora_target_parameters", "overrides_of_model_config", "tokenizer_legacy",
        "tokenizer_use_mistral_common", "resize_token_embeddings_to_32x",
        "mean_resizing_embeddings", "shrink_embeddings", "reinit_weights",
        "unfrozen_parameters", "quantize_moe_experts", "bnb_config_kwargs", "qat",
        "early_stopping_patience", "load_best_model_at_end",
        "fsdp", "fsdp_config", "fsdp_version", "deepspeed", "rl", "context_parallel_size",
        "rl_beta", "dpo_loss_type", "dpo_loss_weights", "dpo_label_smoothing", "dpo_use_weighting",
        "kto_desirable_weight", "kto_undesirable_weight", "orpo_alpha",
    }
)  # fmt: skip

# Compared by content: the files of model and tokenizer, the documents' tokens, the kernel that
# runs. Moved folders and renamed data files are the same.
BY_CONTENT = frozenset(
    {
        "base_model", "revision_of_model", "tokenizer_config", "datasets", "pretraining_dataset",
        "test_datasets", "attn_implementation", "attn_backends",
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
        "trust_remote_code", "tokenizer_save_jinja_files", "experts_implementation",
        "model_quantization_config", "model_quantization_config_kwargs",
        "attn_supports_packing", "attn_uses_flash_lib", "attn_needs_dtype_cast",
        "attn_strict", "attn_forward_only_ok", "attn_known_bad", "batch_size",
        "attn_check_steps",
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "eval_batch_size",
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_offloading",
        "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "output_dir", "logging_steps",
        "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_swiglu", "liger_layer_norm",
        "use_kernels",
        "save_strategy", "save_steps", "saves_per_epoch", "save_total_limit", "save_only_model",
        "resume_from_checkpoint", "auto_resume_from_checkpoints", "ddp_timeout",
        "ddp_find_unused_parameters", "accelerator_config", "dataloader_num_workers",
        "dataloader_pin_memory", "strict", "float16",
        "use_wandb", "wandb_project", "wandb_entity", "wandb_name",
        "wandb_run_id", "wandb_mode", "wandb_watch", "wandb_log_model", "use_mlflow",
        "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name",
        "hf_mlflow_log_artifacts", "use_tensorboard", "report_to", "hub_model_id", "hub_strategy",
        "hub_revision", "loss_watchdog_threshold", "loss_watchdog_patience",
        "save_first_step", "metric_for_best_model", "greater_is_better", "gc_collect_steps",
        "torch_empty_cache_steps", "dataloader_prefetch_factor",
    }
)  # fmt: skip


def build_identity(
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
        **config_identity(config),
        **attention_and_precision(run.backend, run.context),
        **data_identity(config, figures, tokenizer),
        "tokenizer": hash_tokenizer(config),
        "kernels": run.kernels,
        "rows": rows,
        "tokens": tokens,
    }


def config_identity(config: Config) -> dict[str, Any]:
    """Return the part of a run's identity that is known before anything is loaded."""
    return {
        "keys": compared_keys(config),
        "model": hash_model(config),
        "adapter": hash_reference_adapter(config),
        "processes": world_size(),
    }


def compared_keys(config: Config) -> dict[str, Any]:
    """Return the keys that are compared by value, and those that may change."""
    names = BY_VALUE | CHANGEABLE
    if evaluation_affects_training(config.model_dump()):
        names |= EVALUATION_KEYS
    if not config.adapter:
        names = frozenset(n for n in names if not n.startswith(("lora_", "peft_")))
    values = config.model_dump(mode="json", include=set(names))
    if config.adapter == "qlora":
        values["load_in_4bit"] = True
    if isinstance(config.deepspeed, str):
        values["deepspeed"] = _read_json(config.deepspeed)
    return {key: _plain(key, value) for key, value in sorted(values.items())}


def evaluation_affects_training(keys: Mapping[str, Any]) -> bool:
    """Return whether the evaluation loss controls the end, learning rates or model of a run."""
    plateau = keys.get("lr_scheduler") == "reduce_lr_on_plateau"
    best = keys.get("early_stopping_patience") or keys.get("load_best_model_at_end")
    return plateau or bool(best)


def _plain(key: str, value: Any) -> Any:
    """Return a value; None for a false flag or an empty list where the default is None."""
    unset = Config.model_fields[key].default is None and (value is False or value in ([], {}))
    return None if unset else value


def attention_and_precision(backend: str, context: RunContext) -> dict[str, str]:
    """Return the attention backend and the precision of a run."""
    mixed = " autocast" if context.autocast else ""
    return {"attention": backend, "precision": context.dtype + mixed}


def data_identity(
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
                "dated": _hash_if_dated(config, spec, source.key, tokenizer),
                **{name: getattr(source, name)
                   for name in ("content", "read", "documents", "tokens")},
            }
        )  # fmt: skip
    return found


def _hash_if_dated(config: Config, spec: DatasetSpec, key: str, tokenizer: Any) -> str | None:
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


def _read_json(path: str) -> Any:
    """Return the content of a JSON file; the path itself where it can't be read."""
    try:
        return json.loads(Path(path).expanduser().read_bytes())
    except (OSError, ValueError):
        return path


# Keys of the config in the identity that attnimg 0.1.0 wrote, next to processes, rows and tokens.
LEGACY_KEYS = ("micro_batch_size", "gradient_accumulation_steps", "seed")

# Keys that name the modules of an adapter, in several ways.
TARGET_KEYS = frozenset({"lora_target_modules", "lora_target_linear"})

# Backends that do not compute exact attention.
INEXACT_BACKENDS = frozenset({"s2", "fp8", "sage", "kernels-community/sage-attention"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A difference between a run and its checkpoint.

    Attributes:
        key: key of the config.
        before: its value in the checkpoint's run.
        now: its value in this run.
        revert: the edit that removes the difference.
    """

    key: str
    before: object
    now: object
    revert: str


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """Return the identity in a checkpoint; empty if another program wrote it."""
    found: Any = checkpoints.read_run_state(checkpoint).get("identity", {})
    if not found or "keys" in found:
        return dict(found)
    keys = {key: found[key] for key in LEGACY_KEYS if key in found}
    return {"keys": keys, **{key: found[key] for key in found if key not in LEGACY_KEYS}}


def check_resumed_config(config: Config, point: checkpoints.ResumePoint | None) -> None:
    """Raise if a run resumes with other keys or another model, before anything is loaded.

    Raises:
        AttnimgError: a key that changes the result differs (resume-differs), or max_steps ends
            before the checkpoint (resume-past-end).
    """
    if point is None or point.path is None:
        return
    require_same_identity(config_identity(config), config, point)
    if config.max_steps:
        require_steps(config.max_steps, config, point)


def require_steps(total: int, config: Config, point: checkpoints.ResumePoint | None) -> None:
    """Raise if a run would end before the checkpoint that it resumes from.

    Raises:
        AttnimgError: code resume-past-end.
    """
    if point is None or point.path is None or total >= point.step:
        return
    key = "max_steps" if config.max_steps else "num_epochs"
    raise AttnimgError(
        f"{key} ends the run before the checkpoint it resumes from",
        why=f"found {key}: {as_yaml(getattr(config, key))}, which is step {total}; "
        f"{point.path.name} was written after step {point.step}",
        do=f"set max_steps: {point.step} to keep the model of {point.path.name}, or a "
        "higher number to continue training",
        code="resume-past-end",
        key=key,
    )


def require_same_identity(
    now: Mapping[str, Any], config: Config, point: checkpoints.ResumePoint | None
) -> None:
    """Raise if a run resumes with another identity; parts that only one has are not compared.

    Raises:
        AttnimgError: code resume-differs, with each changed key and both values.
    """
    if point is None or point.path is None:
        return
    before = read_identity(point.path)
    changes = _refused_changes(before, now)
    if TARGET_KEYS & {change.key for change in changes} and _same_targets(config, before["keys"]):
        changes = [change for change in changes if change.key not in TARGET_KEYS]
    if not changes:
        return
    name = point.path.name
    keys = ", ".join(change.key for change in changes)
    new_run = "set another output_dir"
    if config.resume_from_checkpoint:
        new_run += " and remove resume_from_checkpoint"
    why = [f"{c.key}: found {as_yaml(c.now)}; {name} was trained with {as_yaml(c.before)}"
           for c in changes]  # fmt: skip
    raise AttnimgError(
        f"{name} can't be resumed with another {keys}",
        why="\n".join(why),
        do="\n".join((*(change.revert for change in changes), f"or, for a new run, {new_run}")),
        code="resume-differs",
        key=changes[0].key,
    )


def accepted_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changed keys whose new values are used."""
    return [change for change in _changed_keys(before, now) if change.key in _changeable(now)]


def _changeable(identity: Mapping[str, Any]) -> frozenset[str]:
    """Return the keys that may change: not max_steps, where it decides how much data is read."""
    keys = identity.get("keys", {})
    streamed = keys.get("streaming") or keys.get("streaming_multipack_buffer_size")
    return CHANGEABLE - {"max_steps"} if streamed else CHANGEABLE


def resume_notes(before: Mapping[str, Any], now: Mapping[str, Any], *, name: str) -> list[str]:
    """Return lines for the user on accepted changes, and on what can't be compared.

    Args:
        before: the checkpoint's identity.
        now: the run's.
        name: the checkpoint's.
    """
    notes = [
        f"{c.key}: {as_yaml(c.before)} until {name}, {as_yaml(c.now)} from here on"
        for c in accepted_changes(before, now)
    ]
    if not evaluation_affects_training(now.get("keys", {})):
        notes += [
            f"warning: {change.key}: found {as_yaml(change.now)}; {name} was evaluated on "
            f"{as_yaml(change.before)}: eval_loss before and after cannot be compared"
            for change in _data_changes(before, now, "evaluation")
        ]
    notes += _kernel_notes(before, now, name=name)
    recorded = {"model": "base_model", "data": "datasets", "attention": "attention"}
    unknown = [text for part, text in recorded.items() if before.get(part) is None]
    if "learning_rate" not in before.get("keys", {}):
        unknown = ["learning_rate and the other keys", *unknown]
    if unknown:
        notes.append(
            f"warning: {name} does not record everything about its run: {', '.join(unknown)} can't "
            "be compared; those of this config are used"
        )
    for part, text in (("attention", "results differ by rounding only"),
                       ("processes", "dropout uses other random numbers"),
                       ("rows", "a step sees other rows"),
                       ("tokens", "a step sees other rows")):  # fmt: skip
        if part in before and before[part] != now[part]:
            notes.append(f"warning: {part}: {before[part]} until {name}, {now[part]} now: {text}")
    return notes


def apply_config(engine: Any, config: Config, before: Mapping[str, Any]) -> None:
    """Make a resumed engine use the config's learning rate, number of steps and intervals.

    transformers restores all three from the checkpoint. An unchanged config changes nothing.

    Args:
        engine: the engine, after transformers restored it.
        config: the validated run.
        before: the checkpoint's identity.
    """
    engine.state.compute_steps(engine.args, engine.state.max_steps)
    scheduler, groups = engine.lr_scheduler, engine.optimizer.param_groups
    rate = float(config.learning_rate or 0)
    if not hasattr(scheduler, "lr_lambdas"):  # reduce_lr_on_plateau: keep its reductions so far
        previous = before.get("keys", {}).get("learning_rate", rate)
        for group in groups if previous != rate else ():
            _set_value(group, "lr", float(group["lr"]) / previous * rate)
        return
    # DeepSpeed creates its own optimizer.
    bases = engine.base_rates or [rate] * len(groups)
    scheduler.base_lrs = bases
    for group, base, factor in zip(groups, bases, scheduler.lr_lambdas, strict=True):
        group["initial_lr"] = base
        _set_value(group, "lr", base * factor(scheduler.last_epoch))
    scheduler._last_lr = [group["lr"] for group in groups]


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the keys that both have with different values."""
    old, new = before.get("keys", {}), now.get("keys", {})
    # A key that only one of them has is newer than the checkpoint, or implied by another key.
    return [
        Change(key=key, before=old[key], now=new[key], revert=_edit(key, old[key]))
        for key in sorted(old.keys() & new.keys())
        if old[key] != new[key]
    ]


def _edit(key: str, value: object) -> str:
    """Return the edit of the config that gives a key a value; None removes the key."""
    return f"remove {key}" if value is None else f"set {key}: {as_yaml(value)}"


def _refused_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the changes that would change the result."""
    changeable = _changeable(now)
    changes = [change for change in _changed_keys(before, now) if change.key not in changeable]
    decides = evaluation_affects_training(now.get("keys", {}))
    return [
        *_batch_changes(changes, before, now),
        *_file_changes("model", "base_model", before, now),
        *_file_changes("adapter", "lora_model_dir", before, now),
        *_file_changes("tokenizer", "tokenizer_config", before, now),
        *_data_changes(before, now, "data"),
        *(_data_changes(before, now, "evaluation") if decides else ()),
        *_precision_and_attention_changes(before, now),
    ]


def _same_targets(config: Config, before: Mapping[str, Any]) -> bool:
    """Return whether the adapter of another run is on the same modules of this model."""
    earlier = config.model_copy(update={key: before.get(key) for key in TARGET_KEYS})
    try:
        model = load_without_weights(config)
        return model is not None and find_targets(model, config) == find_targets(model, earlier)
    except AttnimgError:  # the refused change is reported first
        return False


def _batch_changes(
    changes: list[Change], before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Change]:
    """Return the changes that alter the batch; only processes * accumulation steps matters."""
    key = "gradient_accumulation_steps"
    old, new = before.get("processes"), now.get("processes")
    if None in (old, new) or old == new:
        return changes
    others = [change for change in changes if change.key != key]
    old_steps, new_steps = before["keys"][key], now["keys"][key]
    if old_steps * old == new_steps * new:
        return others
    revert = f"start {old} processes with {key}: {old_steps}"
    if old_steps * old % new == 0:
        revert = f"set {key}: {old_steps * old // new}"
    texts = f"{old_steps} in {old} process(es)", f"{new_steps} in {new}"
    return [*others, Change(key=key, before=texts[0], now=texts[1], revert=revert)]


def _file_changes(
    part: str, key: str, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Change]:
    """Return the changes in the files of the model or the tokenizer; their folder may differ.

    Args:
        part: "model", "adapter" or "tokenizer".
        key: the config's, which names the folder.
        before: the checkpoint's identity; without the part, nothing is compared.
        now: the run's.
    """
    old, new = before.get(part) or {}, now.get(part) or {}
    if "files" not in old or "files" not in new:
        return []
    names = old["files"].keys() | new["files"].keys()
    if part == "tokenizer":
        # Versions of transformers download different files of a repository. Where that changes the
        # tokens, the data differs as well.
        names = old["files"].keys() & new["files"].keys()
    names = sorted(name for name in names if old["files"].get(name) != new["files"].get(name))
    if not names:
        return []
    moved = old["path"] != new["path"] or old["revision"] != new["revision"]
    revert = f"put the earlier {', '.join(names[:3])} back into {new['path']}"
    if moved:
        revert = f"set {key}: {as_yaml(old['path'])}"
        if old["revision"]:
            revert += f" and revision_of_model: {as_yaml(old['revision'])}"
    before_text, now_text = _name_hashes(old, names), _name_hashes(new, names)
    return [Change(key=key, before=before_text, now=now_text, revert=revert)]


def _name_hashes(side: Mapping[str, Any], names: list[str]) -> str:
    """Return a text: a folder, with the start of the SHA-256 of some of its files."""
    hashes = [f"{name} {side['files'].get(name, 'missing')[:12]}" for name in names[:3]]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{side['path']} ({', '.join(hashes)}{more})"


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any], part: str) -> list[Change]:
    """Return the sources whose documents differ from those of the checkpoint's run.

    Args:
        before: the checkpoint's identity; without the part, nothing is compared.
        now: the run's.
        part: "data" to train on, or "evaluation".
    """
    if before.get(part) is None or part not in now:
        return []
    if [source["content"] for source in before[part]] == [s["content"] for s in now[part]]:
        return []
    old_sources = {source["key"]: source for source in before[part]}
    new_sources = {source["key"]: source for source in now[part]}
    changes = []
    for key in sorted(old_sources.keys() | new_sources.keys()):
        old, new = old_sources.get(key), new_sources.get(key)
        if old is None or new is None:
            old_spec, new_spec = old and old["spec"], new and new["spec"]
            revert = f"add {key}: {as_yaml(old_spec)}" if old else f"remove {key}"
            changes.append(Change(key=key, before=old_spec, now=new_spec, revert=revert))
        elif old["content"] != new["content"] and not _differs_by_date(old, new):
            changes += _source_changes(key, old, new)
    return changes


def _differs_by_date(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a source differs only by the date that its template writes."""
    same = ("dated", "spec", "read", "documents")
    return bool(old["dated"]) and all(old.get(name) == new.get(name) for name in same)


def _source_changes(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the changed fields of a source, or its changed content."""
    before, now = old["spec"], new["spec"]
    names = sorted(before.keys() | now.keys())
    fields = [name for name in names if before.get(name) != now.get(name)]
    if not fields:
        texts = [f"{side['documents']} documents, {side['tokens']} tokens, content "
                 f"{side['content'][:12]}" for side in (old, new)]  # fmt: skip
        revert = f"put the earlier files of {as_yaml(now.get('path'))} and of its tokenizer back"
        return [Change(key=key, before=texts[0], now=texts[1], revert=revert)]
    return [
        Change(
            key=f"{key}.{name}",
            before=before.get(name),
            now=now.get(name),
            revert=_edit(f"{key}.{name}", before.get(name)),
        )
        for name in fields
    ]


def _precision_and_attention_changes(
    before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[Change]:
    """Return a change of precision, and of attention to or from one of INEXACT_BACKENDS."""
    changes = []
    old, new = before.get("precision"), now.get("precision")
    if old and new and old != new:
        key = "fp16" if "float16" in old.split() else "bf16"
        value = {"float32": "false", "bfloat16": "full"}.get(old, "true")
        changes.append(Change(key=key, before=old, now=new, revert=f"set {key}: {value}"))
    old, new = before.get("attention"), now.get("attention")
    if old and new and old != new and {old, new} & INEXACT_BACKENDS:
        key = KernelError.default_key
        changes.append(Change(key=key, before=old, now=new, revert=set_backend(old)))
    return changes


def _kernel_notes(before: Mapping[str, Any], now: Mapping[str, Any], *, name: str) -> list[str]:
    """Return a line for each backend whose files changed since a checkpoint."""
    old_kernels, new_kernels = before.get("kernels") or {}, now.get("kernels") or {}
    notes = []
    for backend in sorted(old_kernels.keys() & new_kernels.keys()):
        old, new = old_kernels[backend] or {}, new_kernels[backend] or {}
        parts = sorted(part for part in old.keys() | new.keys() if old.get(part) != new.get(part))
        if parts:
            texts = [
                ", ".join(f"{part} {side.get(part, 'none')[:12]}" for part in parts)
                for side in (old, new)
            ]
            notes.append(
                f"warning: the files of {backend} changed: {texts[0]} until {name}, {texts[1]} "
                "now: results may differ"
            )
    return notes


def _set_value(group: dict[str, Any], key: str, value: float) -> None:
    """Set a value of an optimizer; torchao's optimizers keep theirs in a tensor."""
    if hasattr(group[key], "fill_"):
        group[key].fill_(value)
    else:
        group[key] = value


def as_yaml(value: object) -> str:
    """Return a value as YAML on one line."""
    if value is None:
        return "none"
    text: str = yaml.safe_dump(value, default_flow_style=True, width=2**16, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()

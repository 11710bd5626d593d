"""Convert what TRL and LLaMA-Factory share: the TrainingArguments of transformers.

The meaning of each key is in data/convert/transformers.toml.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, get_args

from attnimg.config.conversion.draft import Draft
from attnimg.config.conversion.tables import OF_TRL
from attnimg.config.optimizer_rules import SCHEDULER_NEEDS
from attnimg.config.schema import Optimizer, Scheduler

_TRACKERS = {"wandb": "use_wandb", "mlflow": "use_mlflow", "tensorboard": "use_tensorboard"}
# Other names of optimizers. Source: transformers 5.22.2, training_args.py, OptimizerNames
# (2026-11-27)
_OPTIMIZERS = {"default_optim": "adamw_torch_fused"}


def convert_training(draft: Draft) -> None:
    """Convert the keys of TrainingArguments whose value is not simply that of one of our keys."""
    _batch(draft)
    _optimization(draft)
    _evaluation(draft)
    _saving(draft)
    _trackers(draft)
    _processes(draft)


def convert_precision(draft: Draft, *, bf16: bool, weights: str, sources: tuple[str, ...]) -> None:
    """Set bf16 and fp16, so that the weights are trained in the same precision.

    In full fine-tuning, bf16: true also keeps the weights in bfloat16 here, in which small updates
    are lost. A trainer with float32 weights is therefore converted to float32.

    Args:
        draft: the conversion; its adapter is set already.
        bf16: whether the trainer computes in bfloat16.
        weights: the trainer's precision of the weights that are trained.
        sources: the keys that decide both.
    """
    fp16 = bool(draft.get("fp16"))
    if fp16 and bf16:
        draft.refuse("fp16", why="bf16 is true as well", do="keep bf16 or fp16")
        return
    if fp16:
        draft.put("fp16", True, "fp16")
        draft.put("bf16", False, *sources)
        return
    draft.answer("fp16", reason="it is off")
    split = draft.values.get("adapter") or draft.values.get("deepspeed")
    if not bf16 or split or weights == "bfloat16":
        draft.put("bf16", bf16, *sources)
        return
    comment = (
        f"{draft.name} computes in bfloat16 and keeps float32 weights. bf16: true also keeps the "
        "weights in bfloat16 here: several times faster and half the memory, but small updates "
        f"are lost. false keeps them in float32, as {draft.name} does."
    )
    name = draft.values.get("attn_implementation")
    if name not in (None, "sdpa", "eager", "flex_attention"):
        key = next((key for key in ("attn_implementation", "flash_attn") if draft.given(key)), "")
        why = f"{name} needs bfloat16, and full fine-tuning keeps float32 weights in {draft.name}"
        in_bfloat16 = "dtype: bfloat16" if draft.trainer in OF_TRL else "pure_bf16: true"
        do = f"remove {key}, or set {in_bfloat16}"
        draft.refuse(key, why=why, do=do)
    draft.put("bf16", False, *sources, comment=comment)


def _batch(draft: Draft) -> None:
    rows, steps = draft.get("per_device_train_batch_size"), draft.get("gradient_accumulation_steps")
    product = ""
    if type(rows) is int and type(steps) is int:
        product = f": {rows} x {steps} = {rows * steps} on one GPU"
    draft.put(
        "micro_batch_size", rows, "per_device_train_batch_size",
        comment="rows of a step: micro_batch_size x gradient_accumulation_steps x number of GPUs"
        + product,
        reason=f"rows of a step{product}",
    )  # fmt: skip
    draft.put("gradient_accumulation_steps", steps, "gradient_accumulation_steps")
    most = draft.get("max_steps")
    draft.put("max_steps", None if most == -1 else most, "max_steps")
    if type(most) is int and most > 0:
        reason = "max_steps takes precedence over it, as in transformers"
        draft.answer("num_train_epochs", reason=reason)
    if draft.trainer == "trl-kto":
        _order_of_kto(draft)
        return
    by_length = bool(draft.get("group_by_length"))
    order = draft.get("train_sampling_strategy")
    if order not in ("random", "group_by_length"):
        draft.refuse(
            "train_sampling_strategy", why="attnimg shuffles the documents of every epoch",
            do="set train_sampling_strategy: random, or remove it",
        )  # fmt: skip
    by_length = by_length or order == "group_by_length"
    draft.put(
        "group_by_length", True if by_length else None, "group_by_length", "train_sampling_strategy"
    )


def _order_of_kto(draft: Draft) -> None:
    """Convert the order of records for KTO, which pairs each prompt with another answer."""
    draft.answer("group_by_length", reason="train_sampling_strategy replaces it")
    if draft.get("train_sampling_strategy") != "sequential" or draft.get("group_by_length"):
        draft.refuse(
            "train_sampling_strategy", why="attnimg reads the records of KTO in one order",
            do="set train_sampling_strategy: sequential",
        )  # fmt: skip
        return
    draft.put("shuffle_merged_datasets", False, "train_sampling_strategy")


def _optimization(draft: Draft) -> None:
    name = str(draft.get("lr_scheduler_type"))
    if name not in get_args(Scheduler):
        why = f"needed one of {', '.join(get_args(Scheduler))}"
        draft.refuse("lr_scheduler_type", why=why, do="set lr_scheduler_type: cosine")
    else:
        draft.put("lr_scheduler", name, "lr_scheduler_type")
    if not draft.given("lr_scheduler_kwargs") and name in SCHEDULER_NEEDS:
        needed, example = SCHEDULER_NEEDS[name]
        why = f"the schedule {name} has no default of {' or '.join(needed)} in attnimg"
        do = f"set lr_scheduler_kwargs: {{{needed[0]}: {example}}}"
        draft.refuse("lr_scheduler_type", why=why, do=do)
    kwargs = parsed_mapping(draft, "lr_scheduler_kwargs")
    draft.put("lr_scheduler_kwargs", kwargs or None, "lr_scheduler_kwargs")
    optimizer = draft.get("optim")
    optimizer = _OPTIMIZERS.get(str(optimizer), optimizer)
    if optimizer not in get_args(Optimizer):
        why = f"needed one of {', '.join(get_args(Optimizer))}"
        draft.refuse("optim", why=why, do="set optim: adamw_torch")
    else:
        draft.put("optimizer", optimizer, "optim")
    ratio, steps = draft.old.get("warmup_ratio"), draft.get("warmup_steps")
    if ratio and steps:
        # Source: transformers 4.57, training_args.py, get_warmup_steps (2026-11-27)
        draft.note(
            "warmup_ratio", "done-otherwise",
            reason="warmup_steps takes precedence over it, as in transformers",
        )  # fmt: skip
        draft.put("warmup_steps", steps, "warmup_steps")
    elif ratio:
        draft.put("warmup_ratio", ratio, "warmup_ratio")
        draft.answer("warmup_steps", reason="0, so warmup_ratio is used")
    else:
        draft.put("warmup_steps", steps or None, "warmup_steps", "warmup_ratio")


def _evaluation(draft: Draft) -> None:
    """Convert when the run evaluates; evaluation data are the trainer's own keys."""
    every = draft.get("eval_steps")
    if not evaluates(draft):
        reason = "the run does not evaluate"
        for key in ("eval_strategy", "eval_steps", "per_device_eval_batch_size"):
            draft.answer(key, reason=reason)
        return
    draft.put("eval_batch_size", draft.get("per_device_eval_batch_size"),
              "per_device_eval_batch_size")  # fmt: skip
    strategy = draft.get("eval_strategy")
    draft.put("eval_strategy", strategy, "eval_strategy")
    if strategy == "steps":
        every = every if every is not None else draft.get("logging_steps")
        _steps(draft, "eval_steps", every)
    else:
        draft.answer("eval_steps", reason=f"eval_strategy is {strategy}")


def evaluates(draft: Draft) -> bool:
    """Return whether the trainer evaluates during the run."""
    return draft.get("eval_strategy") not in ("no", False)


def _saving(draft: Draft) -> None:
    strategy = draft.get("save_strategy")
    strategy = "no" if strategy is False else strategy  # YAML reads no as false
    draft.put("save_strategy", strategy, "save_strategy")
    if strategy == "steps":
        _steps(draft, "save_steps", draft.get("save_steps"))
    else:
        draft.answer("save_steps", reason=f"save_strategy is {strategy}")
    _steps(draft, "logging_steps", draft.get("logging_steps"))
    metric = draft.get("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        draft.refuse(
            "metric_for_best_model", why="attnimg compares the evaluation loss only",
            do="set metric_for_best_model: eval_loss, or remove it",
        )  # fmt: skip


def _steps(draft: Draft, key: str, value: Any) -> None:
    """Set a number of steps; a share of the run is refused."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        why = "a share of the steps is not implemented; needed a whole number"
        draft.refuse(key, why=why, do=f"set {key} to a number of steps")
        return
    draft.put(key, value, key)


def _trackers(draft: Draft) -> None:
    found = draft.get("report_to")
    names = (
        [found] if isinstance(found, str) else list(found or ()) if isinstance(found, list) else []
    )
    names = list(_TRACKERS) if "all" in names else [str(name) for name in names if name != "none"]
    others = [name for name in names if name not in _TRACKERS]
    for name in names:
        if name in _TRACKERS:
            draft.put(_TRACKERS[name], True, "report_to")
    draft.answer("report_to", reason="" if names else "no tracker")
    if others:
        reason = f"attnimg has no tracker {', '.join(others)}; metrics.jsonl has all figures"
        draft.note("report_to", "done-otherwise", reason=reason)
    run = draft.get("run_name")
    for tracker, ours in (("wandb", "wandb_name"), ("mlflow", "mlflow_run_name")):
        if tracker in names and run:
            draft.put(ours, run, "run_name")
    draft.answer(
        "run_name", reason="" if names else "the run reports to no tracker that has run names"
    )
    hub = ("hub_model_id", "hub_strategy", "hub_revision")
    if not draft.get("push_to_hub"):
        for key in ("push_to_hub", *hub):
            draft.answer(key, reason="push_to_hub is false, so nothing is pushed")
    elif not draft.given("hub_model_id"):
        why = "its default is the name of output_dir, in the account that the token belongs to"
        draft.refuse("push_to_hub", why=why, do="set hub_model_id: ORGANIZATION/NAME")
    else:
        draft.put("hub_model_id", draft.get("hub_model_id"), "hub_model_id", "push_to_hub")
        draft.put("hub_strategy", draft.get("hub_strategy"), "hub_strategy")
        draft.put("hub_revision", draft.get("hub_revision"), "hub_revision")


def _processes(draft: Draft) -> None:
    config = draft.old.get("fsdp_config")
    if isinstance(config, str) and (config := parsed_mapping(draft, "fsdp_config")) is None:
        return
    draft.put("fsdp_config", config or None, "fsdp_config")
    sharding = draft.old.get("fsdp")
    draft.put("fsdp", sharding or None, "fsdp")
    path = draft.old.get("deepspeed")
    draft.put("deepspeed", path or None, "deepspeed")
    if not draft.get("dataloader_num_workers"):
        draft.answer("dataloader_prefetch_factor", reason="dataloader_num_workers is 0")
    checkpointing = draft.get("gradient_checkpointing")
    draft.put("gradient_checkpointing", checkpointing, "gradient_checkpointing")
    arguments = parsed_mapping(draft, "gradient_checkpointing_kwargs")
    if checkpointing:
        draft.put("gradient_checkpointing_kwargs", arguments or None,
                  "gradient_checkpointing_kwargs")  # fmt: skip
    else:
        draft.answer("gradient_checkpointing_kwargs", reason="gradient_checkpointing is false")
    if not draft.get("torch_compile"):
        for key in ("torch_compile_backend", "torch_compile_mode"):
            if draft.given(key):  # transformers then compiles
                draft.put("torch_compile", True, key)
                draft.put(key, draft.get(key), key)


def parsed_mapping(draft: Draft, key: str) -> dict[str, Any] | None:
    """Return a mapping, which may be written as JSON text; refuse anything else."""
    value = draft.get(key)
    if isinstance(value, str):
        from attnimg.config.read import parse_value
        from attnimg.errors import AttnimgError

        with suppress(AttnimgError):
            value = parse_value(value)
    if value is None or isinstance(value, dict):
        return value
    draft.refuse(key, why="needed a mapping", do=f"write {key} as a mapping of names to values")
    return None

"""Compute the arguments of TRL's SFTTrainer for a config, and the number of its steps.

Every argument whose default differs from ours is set: TRL's own defaults turn gradient
checkpointing and bf16 on (trl 1.16, sft_config.py, 2026-11-21).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from attnimg.config.schema import Config, Strategy
from attnimg.facts import Machine, RunContext

# Ours -> transformers', where they differ.
OPTIMIZERS = {"paged_adamw": "paged_adamw_32bit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The optimizer steps of a run, and at which of them it evaluates and saves.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the rows.
        total_steps: optimizer steps of the whole run.
        eval_strategy: when it evaluates.
        eval_steps: steps between evaluations, with strategy "steps".
        save_strategy: when it saves.
        save_steps: steps between checkpoints, with strategy "steps".
    """

    steps_per_epoch: int
    total_steps: int
    eval_strategy: Strategy
    eval_steps: int | None
    save_strategy: Strategy
    save_steps: int | None


def plan_steps(config: Config, *, rows: int, world: int, validation: bool) -> Schedule:
    """Return the steps of a run, counted as transformers counts them.

    Args:
        config: the validated run.
        rows: packed rows, or documents when nothing is packed.
        world: processes that share the rows.
        validation: whether there are evaluation rows.
    """
    batches = math.ceil(rows / (config.micro_batch_size * world))
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    total = config.max_steps or math.ceil(config.num_epochs * per_epoch)
    evaluate, eval_steps = _when(
        config.eval_strategy, config.eval_steps, config.evals_per_epoch, per_epoch=per_epoch
    )
    save, save_steps = _when(
        config.save_strategy, config.save_steps, config.saves_per_epoch, per_epoch=per_epoch
    )
    return Schedule(
        steps_per_epoch=per_epoch,
        total_steps=total,
        eval_strategy=evaluate if validation else "no",
        eval_steps=eval_steps if validation else None,
        save_strategy=save,
        save_steps=save_steps,
    )


def _when(
    strategy: Strategy | None, every: int | None, times: int | None, *, per_epoch: int
) -> tuple[Strategy, int | None]:
    """Return the strategy and its number of steps; by default once an epoch, as in axolotl."""
    if every or times:
        return "steps", every or max(1, math.ceil(per_epoch / (times or 1)))
    if strategy == "steps":
        return "steps", max(1, math.ceil(per_epoch / 4))
    return strategy or "epoch", None


def training_arguments(
    config: Config, *, machine: Machine, context: RunContext, schedule: Schedule, sparse: bool
) -> dict[str, Any]:
    """Return the keyword arguments of `trl.SFTConfig` for this run.

    Args:
        config: the validated run.
        machine: the machine of the run; decides tf32 and pinned memory.
        context: how the model is called, as it was proven.
        schedule: the steps of the run.
        sparse: whether the model has experts that a batch may leave out.
    """
    gpu = machine.arch.vendor != "cpu"
    return {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "data_seed": config.seed,
        **_optimisation(config, context=context),
        **_precision(config, machine=machine, context=context),
        **_intervals(config, schedule=schedule),
        **_processes(config, gpu=gpu, sparse=sparse),
        # Rows are packed, collated and counted here, not by TRL.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "prediction_loss_only": True,
        "use_cache": False,
        # The progress bar, logs and sums are also made here, and nothing is reported to servers.
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
    }


def _optimisation(config: Config, *, context: RunContext) -> dict[str, Any]:
    """Return the arguments on steps, batches, optimizer and learning rate."""
    scheduler, scheduler_kwargs = scheduler_of(config)
    given = {
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "lr_scheduler_kwargs": scheduler_kwargs or None,
    }
    return {
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "optim": OPTIMIZERS.get(config.optimizer, config.optimizer),
        "lr_scheduler_type": scheduler,
        "warmup_steps": _warmup(config),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": context.checkpointing,
        "gradient_checkpointing_kwargs": config.gradient_checkpointing_kwargs,
        **{name: value for name, value in given.items() if value is not None},
    }


def scheduler_of(config: Config) -> tuple[str, dict[str, Any]]:
    """Return transformers' name of the learning rate schedule, and its arguments."""
    arguments = dict(config.lr_scheduler_kwargs or {})
    if config.cosine_min_lr_ratio is None:
        return config.lr_scheduler, arguments
    return "cosine_with_min_lr", {**arguments, "min_lr_rate": config.cosine_min_lr_ratio}


def _warmup(config: Config) -> float:
    """Return warmup_steps as transformers 5 takes it: a value below 1 is a share of the run."""
    if config.warmup_steps is not None:
        return float(config.warmup_steps)
    # A ratio of 1 is the whole run, which transformers would read as one step.
    return min(config.warmup_ratio or 0.0, 1 - 1e-9)


def _precision(config: Config, *, machine: Machine, context: RunContext) -> dict[str, Any]:
    """Return the arguments on autocast, tf32 and torch.compile."""
    ampere = machine.arch.capability is not None and machine.arch.capability >= (8, 0)
    gpu = machine.arch.vendor != "cpu"
    mixed = context.autocast
    if config.deepspeed and config.bf16 != "full":
        mixed = context.dtype  # DeepSpeed's engine casts where accelerate would autocast.
    return {
        "bf16": mixed == "bfloat16",
        "fp16": mixed == "float16",
        "tf32": (ampere if config.tf32 == "auto" else config.tf32) if ampere else None,
        "torch_compile": context.compiled,
        "torch_compile_backend": config.torch_compile_backend if context.compiled else None,
        "torch_compile_mode": config.torch_compile_mode if context.compiled else None,
        "use_cpu": not gpu,
    }


def _intervals(config: Config, *, schedule: Schedule) -> dict[str, Any]:
    """Return when the engine logs, evaluates and saves; checkpoint.py keeps save_total_limit."""
    stopping = config.early_stopping_patience or config.lr_scheduler == "reduce_lr_on_plateau"
    return {
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": schedule.eval_strategy,
        "eval_steps": schedule.eval_steps,
        "save_strategy": schedule.save_strategy,
        "save_steps": schedule.save_steps or 500,
        "save_total_limit": None,
        "save_only_model": bool(config.save_only_model),
        "metric_for_best_model": "eval_loss" if stopping else None,
        "greater_is_better": False if stopping else None,
    }


def _processes(config: Config, *, gpu: bool, sparse: bool) -> dict[str, Any]:
    """Return the arguments on data loading and distribution."""
    given: dict[str, Any] = {
        "ddp_timeout": config.ddp_timeout,
        # transformers' default searches for unused weights in every step; only experts can be
        # unused.
        "ddp_find_unused_parameters": sparse
        if config.ddp_find_unused_parameters is None
        else config.ddp_find_unused_parameters,
        "deepspeed": config.deepspeed,
    }
    if config.fsdp or config.fsdp_config:
        version = {"version": config.fsdp_version} if config.fsdp_version else {}
        given["fsdp"] = config.fsdp or True
        given["fsdp_config"] = {**(config.fsdp_config or {}), **version}
    return {
        "dataloader_num_workers": config.dataloader_num_workers or 0,
        "dataloader_pin_memory": gpu if config.dataloader_pin_memory is None
        else config.dataloader_pin_memory and gpu,
        **{name: value for name, value in given.items() if value is not None},
    }  # fmt: skip

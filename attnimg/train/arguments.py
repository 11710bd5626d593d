"""Compute the arguments of TRL's SFTTrainer, check them, and read the settings that it uses.

Every argument whose default differs from ours is set: TRL's own defaults turn gradient
checkpointing and bf16 on (trl 1.16, sft_config.py, 2026-11-21).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnimg.config.optimizer_rules import SCHEDULER_NEEDS
from attnimg.config.schema import Config, SaveStrategy, Strategy
from attnimg.errors import bad_value
from attnimg.facts import Machine
from attnimg.run_facts import Plan, RunContext
from attnimg.train.experts import experts_in_use
from attnimg.train.frozen import frozen_elements

# Ours -> transformers', where they differ.
TRANSFORMERS_OPTIMIZERS = {"paged_adamw": "paged_adamw_32bit"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The optimizer steps of a run, and at which of them it evaluates and saves.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the rows.
        total_steps: optimizer steps of the whole run.
        eval_strategy: when it evaluates.
        eval_steps: steps between evaluations, with strategy "steps".
        save_strategy: when it saves; "best" after an evaluation with the lowest loss so far.
        save_steps: steps between checkpoints, with strategy "steps".
    """

    steps_per_epoch: int
    total_steps: int
    eval_strategy: Strategy
    eval_steps: int | None
    save_strategy: SaveStrategy
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
    evaluate, eval_steps = _interval(
        config.eval_strategy,
        _steps(config.eval_steps, total),
        config.evals_per_epoch,
        per_epoch=per_epoch,
    )
    save: SaveStrategy = "best"
    save_steps = None
    if config.save_strategy != "best":
        save, save_steps = _interval(
            config.save_strategy,
            _steps(config.save_steps, total),
            config.saves_per_epoch,
            per_epoch=per_epoch,
        )
    return Schedule(
        steps_per_epoch=per_epoch,
        total_steps=total,
        eval_strategy=evaluate if validation else "no",
        eval_steps=eval_steps if validation else None,
        save_strategy=save,
        save_steps=save_steps,
    )


def _steps(every: float | None, total: int) -> int | None:
    """Return a number of steps; a value below 1 is a share of the run, as in transformers.

    Source: transformers 5.22.2, trainer_callback.py, TrainerState.compute_steps (2026-11-27)
    """
    if every is None:
        return None
    return math.ceil(every * total) if every < 1 else int(every)


def _interval(
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
    ampere = machine.arch.capability is not None and machine.arch.capability >= (8, 0)
    autocast = context.autocast
    if config.deepspeed and config.bf16 != "full":
        autocast = context.dtype  # DeepSpeed's engine casts where accelerate would autocast.
    scheduler, scheduler_kwargs = scheduler_arguments(config)
    options = config.optim_args or {}
    uses_eval_loss = (
        bool(config.early_stopping_patience or config.load_best_model_at_end)
        or scheduler == "reduce_lr_on_plateau"
        or schedule.save_strategy == "best"
    )
    pin_memory = config.dataloader_pin_memory is not False
    fsdp_config = dict(config.fsdp_config or {})
    if config.fsdp_version:
        fsdp_config["version"] = config.fsdp_version
    # Arguments that are not passed if they are None.
    optional: dict[str, Any] = {
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "optim_args": ",".join(f"{name}={value}" for name, value in options.items()) or None,
        "lr_scheduler_kwargs": scheduler_kwargs or None,
        "accelerator_config": _accelerator_settings(config) or None,
        "torch_empty_cache_steps": config.torch_empty_cache_steps,
        "neftune_noise_alpha": config.neftune_noise_alpha or None,
        "ddp_timeout": config.ddp_timeout,
        "deepspeed": config.deepspeed,
    }
    if config.fsdp or config.fsdp_config:
        optional |= {"fsdp": config.fsdp or True, "fsdp_config": fsdp_config}
    return {
        "output_dir": config.output_dir,
        "seed": config.seed,
        "data_seed": config.seed,
        # Steps, batches, optimizer and learning rate.
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "optim": TRANSFORMERS_OPTIMIZERS.get(config.optimizer, config.optimizer),
        "lr_scheduler_type": scheduler,
        "warmup_steps": _warmup(config),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": context.checkpointing,
        "gradient_checkpointing_kwargs": config.gradient_checkpointing_kwargs,
        # Precision and compilation.
        "bf16": autocast == "bfloat16",
        "fp16": autocast == "float16",
        "tf32": (config.tf32 == "auto" or config.tf32) if ampere else None,
        "torch_compile": context.compiled,
        "torch_compile_backend": config.torch_compile_backend if context.compiled else None,
        "torch_compile_mode": config.torch_compile_mode if context.compiled else None,
        "use_cpu": not gpu,
        # Logs, evaluations and checkpoints; checkpoint.py applies save_total_limit.
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        "eval_strategy": schedule.eval_strategy,
        "eval_steps": schedule.eval_steps,
        "save_strategy": schedule.save_strategy,
        "save_steps": schedule.save_steps or 500,
        "save_total_limit": None,
        "save_only_model": bool(config.save_only_model),
        "metric_for_best_model": "eval_loss" if uses_eval_loss else None,
        "greater_is_better": False if uses_eval_loss else None,
        # Data loading and processes.
        "dataloader_num_workers": config.dataloader_num_workers or 0,
        "dataloader_prefetch_factor": config.dataloader_prefetch_factor
        if config.dataloader_num_workers
        else None,
        "dataloader_pin_memory": gpu and pin_memory,
        # transformers' default searches for unused weights in every step; only experts can be
        # unused.
        "ddp_find_unused_parameters": sparse
        if config.ddp_find_unused_parameters is None
        else config.ddp_find_unused_parameters,
        # Rows are packed, collated and counted by rows.py, not by TRL.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "prediction_loss_only": True,
        "use_cache": False,
        # records.py writes the logs; tracker_callback.py adds the callbacks of trackers.
        "disable_tqdm": True,
        "log_level": "error",
        "log_level_replica": "error",
        "report_to": "none",
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": True,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _accelerator_settings(config: Config) -> dict[str, Any]:
    """Return the settings of accelerate that do not have to have their defaults."""
    settings = config.accelerator_config or {}
    names = ("non_blocking", "gradient_accumulation_kwargs")
    return {name: settings[name] for name in names if settings.get(name) is not None}


def scheduler_arguments(config: Config) -> tuple[str, dict[str, Any]]:
    """Return transformers' name of the learning rate schedule, and its arguments."""
    arguments = dict(config.lr_scheduler_kwargs or {})
    if config.eta_min is not None:
        return "cosine_with_min_lr", {**arguments, "min_lr": config.eta_min}
    if config.cosine_min_lr_ratio is not None:
        return "cosine_with_min_lr", {**arguments, "min_lr_rate": config.cosine_min_lr_ratio}
    return config.lr_scheduler, arguments


def _warmup(config: Config) -> float:
    """Return warmup_steps as transformers 5 takes it: a value below 1 is a share of the run."""
    if config.warmup_steps is not None:
        return float(config.warmup_steps)
    # A ratio of 1 is the whole run, which transformers would read as one step.
    return min(config.warmup_ratio or 0.0, 1 - 1e-9)


def settings_in_use(engine: Any, plan: Plan) -> dict[str, object]:
    """Return the settings that a trainer uses, when it is ready for its next step.

    Args:
        engine: the engine, after it restored the checkpoint, if there is one.
        plan: for the backends that a router calls.
    """
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    arguments, accelerator = engine.args, engine.accelerator
    return {
        "step": engine.state.global_step,
        "max_steps": engine.state.max_steps,
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "groups": [
            {"tensors": len(group["params"])}
            | {name: _number(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "scheduler": {
            "class": type(scheduler).__name__,
            "last_epoch": getattr(scheduler, "last_epoch", None),
            "warmup_steps": arguments.get_warmup_steps(engine.state.max_steps),
            "base_lrs": [_number(rate) for rate in getattr(scheduler, "base_lrs", ())],
        },
        "max_grad_norm": arguments.max_grad_norm,
        "micro_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "seed": arguments.seed,
        "dtypes": {
            "trained": _count_by_dtype(engine.model, trained=True),
            "frozen": _count_by_dtype(engine.model, trained=False),
        },
        "experts": experts_in_use(engine.model),
        "attention": {
            "modules": _attention_modules(engine.model),
            "backends": [
                {"layers": choice.layers, "backend": choice.verdict.backend.name}
                for choice in plan.groups
            ],
        },
    }


def _number(value: Any) -> Any:
    """Return a value as a number; torchao's optimizers keep their learning rate in a tensor."""
    return value.item() if hasattr(value, "item") else value


def _count_by_dtype(model: Any, *, trained: bool) -> dict[str, int]:
    """Return how many weights have each dtype, of the trained or of the frozen ones."""
    found: Counter[str] = Counter()
    for weight in model.parameters():
        if weight.requires_grad is trained:
            found[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    return dict(found)


def _attention_modules(model: Any) -> list[dict[str, object]]:
    """Return each kind of attention module with the implementation that it calls, and its count."""
    found: Counter[tuple[str, int | None, str]] = Counter()
    for module in model.modules():
        name = type(module).__name__
        called = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if "Attention" in name and called is not None:
            found[name, getattr(module, "sliding_window", None), str(called)] += 1
    return [
        {"class": name, "window": window, "implementation": called, "count": count}
        for (name, window, called), count in found.items()
    ]


def count_weights(model: Any) -> dict[str, int]:
    """Return the number of trained weights and of all, without the frozen copies of PEFT's modules.

    Tied weights count once, packed 4-bit ones by their unpacked number, and rows that
    unfrozen_parameters does not name not as trained.
    """
    counts, frozen = {"trained": 0, "all": 0}, frozen_elements(model)
    for name, weight in model.named_parameters():
        if ".original_module." not in name:  # of modules_to_save
            counts["all"] += _numel(weight, name=name)
            if weight.requires_grad:
                counts["trained"] += _numel(weight, name=name) - frozen.get(id(weight), 0)
    return counts


def _numel(weight: Any, *, name: str) -> int:
    """Return the number of a weight's elements, of a sharded or packed one as well."""
    # Fused experts in 4 bits, two in a byte.
    is_packed = ".parametrizations." in name and str(weight.dtype) == "torch.uint8"
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of a weight.
    count = int(weight.numel() or getattr(weight, "ds_numel", 0))
    if type(weight).__name__ == "Params4bit":
        return count * 2 * int(weight.element_size())
    if is_packed:
        return count * 2
    return count


def weights_text(counts: Mapping[str, int]) -> str:
    """Return the line on the weights that a run prints before its first step."""
    trained, total = counts["trained"], counts["all"]
    return f"weights: trains {trained:,} of {total:,} ({trained / max(total, 1):.2%})"


# Steps of the schedule in the test where max_steps is not set.
_STEPS = 100


def try_options(config: Config) -> None:
    """Raise unless the schedule, torch.compile and checkpointing accept the config's arguments.

    Raises:
        AttnimgError: code bad-value.
    """
    if config.lr_scheduler_kwargs:
        _try_schedule(config)
    if config.torch_compile and (config.torch_compile_backend or config.torch_compile_mode):
        _check_compile(config)
    if config.gradient_checkpointing and config.gradient_checkpointing_kwargs:
        _try_checkpointing(config)


def _try_schedule(config: Config) -> None:
    """Build the learning rate schedule, and compute the rates of some steps."""
    import torch
    from transformers import get_scheduler

    name, arguments = scheduler_arguments(config)
    steps = config.max_steps or _STEPS
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate or 1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule warns if its optimizer does not step
            schedule = get_scheduler(
                name,
                optimizer=optimizer,
                num_warmup_steps=min(math.ceil(config.warmup_steps or 0), steps),
                num_training_steps=steps,
                scheduler_specific_kwargs=arguments,
            )
            for _ in range(min(steps, _STEPS)):
                schedule.step(*([1.0] if name == "reduce_lr_on_plateau" else []))
                rate = optimizer.param_groups[0]["lr"]
                if not (isinstance(rate, int | float) and math.isfinite(rate) and rate >= 0):
                    raise ValueError(f"found a learning rate of {rate}")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        needed, value = SCHEDULER_NEEDS.get(config.lr_scheduler, ((), ""))
        raise bad_value(
            "lr_scheduler_kwargs",
            f"lr_scheduler: {config.lr_scheduler} does not accept these lr_scheduler_kwargs",
            why=f"found {config.lr_scheduler_kwargs}; {error}",
            do=f"set lr_scheduler_kwargs: {{{needed[0]}: {value}}}"
            if needed
            else "remove lr_scheduler_kwargs",
        ) from error


def _check_compile(config: Config) -> None:
    """Raise unless torch knows the names in torch_compile_backend and torch_compile_mode."""
    import torch._dynamo
    import torch._inductor
    from accelerate.utils import DynamoBackend

    known = {backend.value.lower() for backend in DynamoBackend}
    backends = sorted(known & set(torch._dynamo.list_backends(exclude_tags=())))
    for key, names in (
        ("torch_compile_backend", backends),
        ("torch_compile_mode", sorted(torch._inductor.list_mode_options())),
    ):
        value = getattr(config, key)
        if value is not None and value not in names:
            raise bad_value(
                key,
                f"{key}: {value} is not known",
                why=f"needed one of {', '.join(names)}, which torch {torch.__version__} and "
                "accelerate have",
                do=f"remove {key}",
            )


def _try_checkpointing(config: Config) -> None:
    """Run one step under gradient checkpointing with the config's arguments."""
    import torch
    from torch.utils.checkpoint import checkpoint

    arguments: dict[str, Any] = {
        "use_reentrant": False,
        **(config.gradient_checkpointing_kwargs or {}),
    }
    try:
        checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **arguments).backward()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise bad_value(
            "gradient_checkpointing_kwargs",
            "gradient_checkpointing does not accept these gradient_checkpointing_kwargs",
            why=f"found {config.gradient_checkpointing_kwargs}; {str(error).splitlines()[0]}",
            do="remove gradient_checkpointing_kwargs",
        ) from error

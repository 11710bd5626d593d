"""Check the machine, files and folders of a run before anything heavy is loaded.

The values of its config are checked already, by attnimg.config.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import warnings
from pathlib import Path
from typing import Any

from attnimg.config.rules import SCHEDULER_NEEDS
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.train.arguments import scheduler_of
from attnimg.train.checkpoint import ResumePoint
from attnimg.train.model_files import check_model_files
from attnimg.train.output_dir import check_output_dir
from attnimg.train.resume import check_settings


def check_inputs(config: Config, machine: Machine) -> ResumePoint | None:
    """Raise for what the machine can't do, missing files, and an output_dir that is in use.

    This lists files, and reads all files of a checkpoint that the run resumes from.

    Returns:
        Where the run resumes; None when it starts in an empty folder.

    Raises:
        AttnimgError: exit code 2, with the key at fault.
    """
    _check_homes(config)
    check_limits(config, machine)
    check_model_files(config)
    point = check_output_dir(config)
    check_settings(config, point)
    return point


def _check_homes(config: Config) -> None:
    """Raise for a path in the home of a user that does not exist, such as ~nobody/out."""
    for key in ("base_model", "tokenizer_config", "output_dir", "dataset_prepared_path",
                "resume_from_checkpoint", "deepspeed"):  # fmt: skip
        value = getattr(config, key)
        try:
            _ = isinstance(value, str) and Path(value).expanduser()
        except RuntimeError:
            raise _bad(
                key,
                f"{key}: {value} can't be found",
                why=f"found no home of the user {value.partition('/')[0][1:] or 'who runs this'}",
                do=f"write {key} without ~",
            ) from None


# Paged optimizers whose unpaged equivalent has another name.
_UNPAGED = {"paged_adamw": "adamw_torch_fused", "paged_adamw_32bit": "adamw_torch_fused"}

# Limits of the processes that load or prepare data: each takes 0.4 GB, and more are not faster.
_PROCESSES, _PROCESSES_A_CPU = 16, 4

# The smallest address space that a run may have. On a CPU a tiny model takes 2.3 GiB, torch 2.13.
_ADDRESS_BYTES = 3 << 30

# Bytes that a worker needs in /dev/shm besides its batches, and bytes of a token in input_ids,
# labels and position_ids or attention_mask.
_SHARED_BYTES, _TOKEN_BYTES = 1 << 20, 24


def check_limits(config: Config, machine: Machine) -> None:
    """Raise for settings that this machine or the installed packages do not support.

    Raises:
        AttnimgError: an optimizer, a precision or a kind of distributed training that would fail
            later or silently be replaced by another.
    """
    _check_optimizer(config, machine)
    _check_processes(config)
    _check_address_space()
    _check_shared_memory(config)
    cpu = machine.arch.vendor == "cpu"
    capability = machine.arch.capability
    if config.tf32 is True and (capability is None or capability < (8, 0)):
        raise _bad(
            "tf32",
            "tf32 needs an Ampere GPU or newer",
            why=f"found {machine.gpu} ({machine.arch.name}); needed sm_80 or above",
            do="set tf32: auto",
        )
    for key, found in (
        ("fsdp", [name for name in ("fsdp", "fsdp_config") if getattr(config, name)]),
        ("deepspeed", ["deepspeed"] if config.deepspeed else []),
    ):
        if found and cpu:
            raise AttnimgError(
                f"{key} needs a GPU",
                why="on a CPU accelerate would silently run plain DDP; found no GPU",
                do=f"remove {' and '.join(found)}; torchrun --nproc-per-node N trains here",
                code=f"{key}-needs-gpu",
                key=key,
            )
    if config.deepspeed and not _installed(machine, "deepspeed"):
        raise AttnimgError(
            "deepspeed is not installed",
            why="found the key deepspeed, and no such package",
            do="install deepspeed, or use fsdp",
            code="not-installed",
            key="deepspeed",
        )


def _check_optimizer(config: Config, machine: Machine) -> None:
    """Raise for paged optimizers on a CPU, and for those of a package that is not installed."""
    name = config.optimizer
    if name.startswith("paged_") and machine.arch.vendor == "cpu":
        raise _bad(
            "optimizer",
            f"optimizer: {name} needs a GPU",
            why="paged memory is CUDA's; found no GPU, and bitsandbytes would fall back unpaged",
            do=f"set optimizer: {_UNPAGED.get(name, name.removeprefix('paged_'))}",
        )
    needs = "torchao" if name in ("adamw_torch_8bit", "adamw_torch_4bit") else None
    if needs and not _installed(machine, needs):
        raise AttnimgError(
            f"optimizer: {name} needs {needs}",
            why=f"{needs} is not installed",
            do=f"install {needs}, or set optimizer: adamw_8bit",
            code="not-installed",
            key="optimizer",
        )


def _installed(machine: Machine, package: str) -> bool:
    return machine.packages is None or package in machine.packages


def _check_processes(config: Config) -> None:
    """Raise for more data processes than this machine can run."""
    cpus = os.cpu_count() or 1
    most = max(_PROCESSES, _PROCESSES_A_CPU * cpus)
    for key in ("dataloader_num_workers", "dataset_num_proc", "dataset_processes"):
        asked = getattr(config, key) or 0
        if asked > most:
            raise _bad(
                key,
                f"{key}: {asked} is more than this machine can run",
                why=f"found {cpus} CPUs; needed at most {most} processes",
                do=f"set {key}: {cpus}",
            )


def _check_address_space() -> None:
    """Raise for an address space that is too small for torch and its libraries.

    Under such a limit, Python can wait forever for a thread that could not start.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and limit < _ADDRESS_BYTES:
        raise AttnimgError(
            "ulimit -v leaves too little memory",
            why=f"found {limit >> 20:,} MiB; needed at least {_ADDRESS_BYTES >> 20:,}, of which "
            "torch and its libraries take 2,300",
            do="run ulimit -v unlimited before attnimg",
            code="bad-environment",
        )


def _check_shared_memory(config: Config) -> None:
    """Raise for workers whose batches do not fit in /dev/shm: torch would wait for them forever.

    Each worker keeps two batches ready (prefetch_factor of torch's DataLoader).
    """
    workers = config.dataloader_num_workers or 0
    tokens = config.micro_batch_size * config.sequence_len
    needed = max(_SHARED_BYTES, workers * 2 * tokens * _TOKEN_BYTES)
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return
    if workers and free < needed:
        raise AttnimgError(
            "shared memory (/dev/shm) is too small for dataloader_num_workers",
            why=f"found {free / 2**20:,.1f} MiB free; needed {needed / 2**20:,.1f} for "
            f"{workers} workers with two batches of {tokens:,} tokens each",
            do="set dataloader_num_workers: 0, or start the container with --shm-size=1g",
            code="out-of-memory",
            key="dataloader_num_workers",
        )


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

    name, arguments = scheduler_of(config)
    steps = config.max_steps or _STEPS
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate or 1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the schedule warns if its optimizer does not step
            schedule = get_scheduler(
                name,
                optimizer=optimizer,
                num_warmup_steps=min(config.warmup_steps or 0, steps),
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
        raise _bad(
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
            raise _bad(
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

    given: dict[str, Any] = {"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})}
    try:
        checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **given).backward()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise _bad(
            "gradient_checkpointing_kwargs",
            "gradient_checkpointing does not accept these gradient_checkpointing_kwargs",
            why=f"found {config.gradient_checkpointing_kwargs}; {str(error).splitlines()[0]}",
            do="remove gradient_checkpointing_kwargs",
        ) from error


def _bad(key: str, what: str, *, why: str, do: str) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="bad-value", key=key)

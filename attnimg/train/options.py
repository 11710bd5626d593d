"""Check options that are passed on to PyTorch and transformers, before the model is loaded.

Names and ranges differ between releases, so the installed libraries check them.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from attnimg.config.rules import SCHEDULER_NEEDS
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.arguments import scheduler_of

# Steps of the tried schedule where max_steps is not set.
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
            warnings.simplefilter("ignore")  # of a schedule that steps without its optimizer
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
        raise AttnimgError(
            f"lr_scheduler: {config.lr_scheduler} does not accept these lr_scheduler_kwargs",
            why=f"found {config.lr_scheduler_kwargs}; {error}",
            do=f"set lr_scheduler_kwargs: {{{needed[0]}: {value}}}"
            if needed
            else "remove lr_scheduler_kwargs",
            code="bad-value",
            key="lr_scheduler_kwargs",
        ) from error


def _check_compile(config: Config) -> None:
    """Compare torch_compile_backend and torch_compile_mode with the names that torch has."""
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
            raise AttnimgError(
                f"{key}: {value} is not known",
                why=f"needed one of {', '.join(names)}, which torch {torch.__version__} and "
                "accelerate have",
                do=f"remove {key}",
                code="bad-value",
                key=key,
            )


def _try_checkpointing(config: Config) -> None:
    """Run one step under gradient checkpointing with the config's arguments."""
    import torch
    from torch.utils.checkpoint import checkpoint

    given: dict[str, Any] = {"use_reentrant": False, **(config.gradient_checkpointing_kwargs or {})}
    try:
        checkpoint(torch.sin, torch.zeros(1, requires_grad=True), **given).backward()
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise AttnimgError(
            "gradient_checkpointing does not accept these gradient_checkpointing_kwargs",
            why=f"found {config.gradient_checkpointing_kwargs}; {str(error).splitlines()[0]}",
            do="remove gradient_checkpointing_kwargs",
            code="bad-value",
            key="gradient_checkpointing_kwargs",
        ) from error

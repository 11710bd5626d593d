"""More than one process: who am I, do all agree, does anyone want to stop."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn

from attnimg.errors import AttnimgError


def world_size() -> int:
    """Count the processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Tell this process's number; 0 prints and writes."""
    return int(os.environ.get("RANK", "0"))


def join(*, cpu: bool) -> None:
    """Meet the other processes that torchrun started; alone, do nothing.

    Args:
        cpu: whether they talk over gloo because there is no GPU.
    """
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    if not torch.distributed.is_initialized():
        PartialState(cpu=cpu)
        # A process that ends with gloo's threads still running aborts now and then, after all is
        # done, and torchrun would report a failed run.
        atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """Exit; one of several processes exits without taking torch's threads apart.

    Gloo's threads and DDP's reducer outlive Python, and their teardown aborts (SIGABRT) now and
    then although all is written: torchrun would call a good run failed. Seen with torch 2.13 on
    CPU, about once in ten runs of two processes (2026-11-21).
    """
    if world_size() == 1:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def agree(plan_json: str, *, cpu: bool) -> None:
    """Make sure that every process came to the same plan, before it loads anything.

    Args:
        plan_json: the plan as text, the same on every process if the plan is.
        cpu: whether the processes talk over gloo because there is no GPU.

    Raises:
        AttnimgError: two processes planned differently (rank-mismatch).
    """
    if world_size() == 1:
        return
    import torch

    join(cpu=cpu)
    plans: list[str] = [""] * world_size()
    torch.distributed.all_gather_object(plans, plan_json)
    odd = [number for number, plan in enumerate(plans) if plan != plans[0]]
    if odd:
        raise AttnimgError(
            "the processes do not agree on the plan",
            why=f"rank {odd[0]} of {len(plans)} planned otherwise than rank 0:\n"
            f"rank 0: {_shorten(plans[0], plans[odd[0]])}\n"
            f"rank {odd[0]}: {_shorten(plans[odd[0]], plans[0])}",
            do="give every process the same GPU, packages and config",
            code="rank-mismatch",
            exit_code=1,
        )


def any_rank(wish: bool) -> bool:
    """Tell whether any process has the wish; every process must ask, and all get one answer."""
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return wish
    on_gpu = torch.distributed.get_backend() == "nccl"
    flag = torch.tensor([int(wish)], device="cuda" if on_gpu else "cpu")
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def _shorten(text: str, other: str, *, width: int = 120) -> str:
    """Cut to the first difference, with a little before it."""
    same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
    return text[max(0, same - 40) : same + width]

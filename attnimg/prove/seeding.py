"""Tell whether a call set torch's random numbers back, which the whole run draws from."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn(device: torch.device) -> dict[str, Tensor]:
    """Draw a number, so that starting anew shows, and give the states of the generators."""
    torch.rand(())
    if device.type == "cuda":
        torch.rand((), device=device)
    return _states(device)


def is_set_back(before: dict[str, Tensor], device: torch.device) -> bool:
    """Compare the generators with what they were before a call that has nothing to draw."""
    after = _states(device)
    if not torch.equal(before["cpu"], after["cpu"]):
        return True
    if "cuda" not in before:
        return False
    # A seed and an offset: going on is harmless there, and some kernels reserve numbers.
    (seed, offset), (seed_after, offset_after) = (
        states["cuda"].view(torch.int64).tolist() for states in (before, after)
    )
    return bool(seed != seed_after or offset_after < offset)


def _states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states

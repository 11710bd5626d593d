"""Check whether a call set torch's random numbers back, which the whole run draws from."""

from __future__ import annotations

import torch
from torch import Tensor

# The CPU's generator is a Mersenne Twister: it makes this many words at a time.
_BLOCK = 624
# Blocks that a call without dropout may have drawn on the CPU: 640 000 numbers, far more than a
# kernel that draws a seed or a rotation takes.
_BLOCKS = 1024
# Where these words lie in the generator's state, 8 bytes each. Source: torch 2.13.0,
# aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy: seed, left and seeded, next,
# state[624] (2026-11-26).
_WORDS = slice(3 * 8, (3 + _BLOCK) * 8)


def drawn(device: torch.device) -> dict[str, Tensor]:
    """Draw a number, so that starting over shows, and return the states of the generators."""
    torch.rand(())
    if device.type == "cuda":
        torch.rand((), device=device)
    return _states(device)


def is_set_back(before: dict[str, Tensor], device: torch.device) -> bool:
    """Compare the generators with what they were before a call that has nothing to draw.

    Going on is harmless: some kernels reserve numbers, or draw a seed of their own.
    """
    after = _states(device)
    if not _is_ahead(before["cpu"], after["cpu"]):
        return True
    if "cuda" not in before:
        return False
    # A seed and an offset.
    (seed, offset), (seed_after, offset_after) = (
        states["cuda"].view(torch.int64).tolist() for states in (before, after)
    )
    return bool(seed != seed_after or offset_after < offset)


def _is_ahead(before: Tensor, after: Tensor) -> bool:
    """Check whether drawing, and nothing else, leads from one state of the CPU's generator on."""
    if torch.equal(before, after):
        return True
    replay = torch.Generator()
    replay.set_state(before)
    for _ in range(_BLOCKS):
        if torch.equal(replay.get_state()[_WORDS], after[_WORDS]):
            # The same block: as many words or fewer are left.
            return _left(after) <= _left(replay.get_state())
        # One word each.
        torch.rand(_left(replay.get_state()), generator=replay)
    return False


def _left(state: Tensor) -> int:
    """Return how many words of its block a CPU generator has left, 1 to 624."""
    return int(state[8:12].view(torch.int32).item())


def _states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states

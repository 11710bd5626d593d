"""Check whether a call seeded torch's random numbers, or set them to an earlier state."""

from __future__ import annotations

import torch
from torch import Tensor

# The CPU's generator is a Mersenne Twister, which generates this many words at a time.
_BLOCK = 624

# Blocks that a call without dropout may draw on the CPU: 640 000 numbers, far more than a kernel
# needs for a seed or a rotation.
_BLOCKS = 1024

# The position of these words in the generator's state, 8 bytes each. Source: torch 2.13.0,
# aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy: seed, left and seeded, next,
# state[624] (2026-11-26).
_WORDS = slice(3 * 8, (3 + _BLOCK) * 8)


def draw_and_read_states(device: torch.device) -> dict[str, Tensor]:
    """Draw a number from each generator, so that seeding changes its state; return the states."""
    torch.rand(())
    if device.type == "cuda":
        torch.rand((), device=device)
    return _states(device)


def is_rewound(before: dict[str, Tensor], device: torch.device) -> bool:
    """Return whether a call seeded a generator or set it to an earlier state.

    Drawing numbers is allowed: some kernels reserve random numbers, or draw a seed of their own.
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
    """Return whether the CPU's generator gets from one state to the other only by drawing."""
    if torch.equal(before, after):
        return True
    replay = torch.Generator()
    replay.set_state(before)
    for _ in range(_BLOCKS):
        if torch.equal(replay.get_state()[_WORDS], after[_WORDS]):
            # In the same block: it is ahead if no more words are left than before.
            return _left(after) <= _left(replay.get_state())
        # Each number takes one word.
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

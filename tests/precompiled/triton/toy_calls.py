"""Calls of a kernel that is as small as one with shared memory and tensor cores can be.

In place of docker/precompiled/triton/sage_calls.py, for a machine without SageAttention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def scores(q, k, out, tokens, HEADS: tl.constexpr, DIM: tl.constexpr):
    rows, columns = tl.arange(0, 64), tl.arange(0, DIM)
    at = (rows[:, None] * HEADS + tl.program_id(0)) * DIM + columns[None, :]
    inside = rows[:, None] < tokens
    products = tl.dot(tl.load(q + at, inside, 0.0), tl.trans(tl.load(k + at, inside, 0.0)))
    tl.store(out + rows[:, None] * 64 + rows[None, :], products, inside)


def calls(
    asked: dict[str, Any], device: str, *, batch: int = 1, tokens: Any = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    for heads in asked["heads"]:
        yield f"h{heads}", partial(score, heads, batch, tokens or (64, 63))


def score(heads: int, batch: int, lengths: Any) -> None:
    for length in lengths:
        q = torch.zeros(batch, length, heads, 64, dtype=torch.bfloat16)
        scores[(heads,)](q, q, torch.empty(64, 64), length, HEADS=heads, DIM=64)

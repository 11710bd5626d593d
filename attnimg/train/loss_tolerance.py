"""Compute how much rounding alone can change a loss and a gradient norm.

The output layer of a class rounds each logit at most ROUNDINGS times (product, bias, scale, and a
cap's division, tanh and product), each by a relative error of at most u = eps / 2 of the run's
dtype, in effect at random, with a standard deviation of u / sqrt(3). Source: Higham and Mary, "A
new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), 2019: rounding
errors of either sign grow with the square root of their number (2026-11-27).

A token's loss changes by the sum over the vocabulary of (p_v - [v is the label]) dz_v; the mean
over N tokens by 1 / N of the root of the summed squares. The float32 sums over a vocabulary of V
add a relative error of sqrt(V) u32. SIGMAS such deviations are allowed.

A gradient norm changes by the same roundings, forward and backward, relative to itself.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from attnimg.train.collate import NO_LOSS
from attnimg.train.loss_facts import Tolerance

if TYPE_CHECKING:
    import torch

ROUNDINGS = 6
SIGMAS = 8.0


def loss_tolerance(
    logits: torch.Tensor, targets: torch.Tensor, *, loss: float, precision: str
) -> Tolerance:
    """Return the largest differences that rounding explains.

    Args:
        logits: (B, S, V), of the model's own forward.
        targets: int64 (B, S), the label that each position predicts or -100.
        loss: negative log-likelihood per trained token.
        precision: the run's dtype; the dtype of the logits is used where it is coarser.
    """
    import torch

    u32 = torch.finfo(torch.float32).eps / 2
    u = max(torch.finfo(dtype).eps / 2 for dtype in (getattr(torch, precision), logits.dtype))
    trained = targets != NO_LOSS
    z = logits[trained].float()
    weight = z.softmax(-1)
    weight[torch.arange(len(z), device=z.device), targets[trained]] -= 1
    # Rounding errors of a dot product are relative to its terms, which a small logit hides.
    size = z.square() + z.square().mean(-1, keepdim=True)
    variance = (weight.square() * size).sum().item() * ROUNDINGS * u**2 / 3
    sums = math.sqrt(z.shape[-1]) * u32
    return Tolerance(
        loss=SIGMAS * (math.sqrt(variance) / max(len(z), 1) + sums * max(abs(loss), 1.0)),
        grad_norm=SIGMAS * (math.sqrt(2 * ROUNDINGS / 3) * u + sums),
    )

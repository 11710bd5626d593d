"""Bound the rounding errors of one attention call, element by element.

The bounds of checks.py are multiples of plain attention's own error. Where few values are rounded,
that error may be small by chance, or 0: a query that sees one or two keys, or scores of hundreds,
of which one key has all the weight. This module bounds the error from the inputs instead.
Letters: T query tokens, S key tokens, H query heads, G key heads, R query heads to a key head, D
head size of q and k, E head size of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnimg.verification.blocks import RowAttention

# Half of the spacing of float32 at 1: the unit roundoff.
UNIT = 2.0**-24

# Standard deviations within which a sum of roundings stays: it exceeds 6 with a probability of
# 2e-9, and a proof compares about 1e6 elements.
DEVIATIONS = 6.0

# The same for a rounding of at most 1: its standard deviation is 1 / sqrt(3).
_RANDOM = DEVIATIONS / 3**0.5

# Errors of scores above this one are cut: exp() of it times any weight above 2e-9 is at least 1.
_LARGEST = 20.0

# Queries that are computed at once.
_TILE = 256


def rounding_bounds(row: RowAttention, *, unit: float) -> dict[str, Tensor]:
    """Return bounds on the rounding errors of out, dq, dk and dv of a right kernel, float32.

    Each rounding changes a value by at most u times the value. Roundings of a sum of n terms are
    assumed to be independent, so that the sum changes by at most DEVIATIONS / sqrt(3) * sqrt(n) * u
    times the sum of absolute terms. Source of the model: Higham and Mary, A New Approach to
    Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019.

    Args:
        row: the inputs, with d_out.
        unit: u of the run's precision. Sums are in float32.

    Returns:
        "out": (H, T, E), "dq": (H, T, D), "dk": (G, S, D) and "dv": (G, S, E).
    """
    assert row.d_out is not None
    n_heads, n_tokens, size = row.q.shape
    size_v = row.v.shape[-1]
    out, dq = (row.q.new_zeros(n_heads, n_tokens, n, dtype=torch.float32) for n in (size_v, size))
    dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (row.k, row.v))
    for begin in range(0, n_tokens, _TILE):
        queries = slice(begin, min(begin + _TILE, n_tokens))
        keys = slice(int(row.first_T[queries].min()), int(row.last_T[queries].max()))
        if keys.start < keys.stop:
            found = _bounds_of_tile(row, queries, keys, unit=unit)
            out[:, queries], dq[:, queries] = found[:2]
            dk[:, keys] += found[2]
            dv[:, keys] += found[3]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def _bounds_of_tile(
    row: RowAttention, queries: slice, keys: slice, *, unit: float
) -> tuple[Tensor, ...]:
    """Return the bounds for some queries, and their parts of the bounds for the keys they see."""
    grouped = row.grouped()
    assert grouped.d_out is not None
    q, d_out = (x[:, :, queries].float() for x in (grouped.q, grouped.d_out))
    k, v = (x[:, :, keys].float() for x in (grouped.k, grouped.v))
    place = torch.arange(keys.start, keys.stop, device=q.device)
    hidden = (place < row.first_T[queries, None]) | (place >= row.last_T[queries, None])
    scale, sum_v = abs(row.scale), _RANDOM * v.shape[-1] ** 0.5 * UNIT

    # The relative error of exp(score - log_sum) is the absolute error of the score: kernels round
    # q * scale, the score, its product with log2(e) and the log-sum-exp.
    scores, derivative = q @ k.mT * row.scale, torch.ones(())
    off = scale * _RANDOM * unit * (q.square() @ k.square().mT).sqrt()
    off += scale * _RANDOM * q.shape[-1] ** 0.5 * UNIT * (q.abs() @ k.abs().mT)
    if row.softcap:
        capped = torch.tanh(scores / row.softcap)
        scores, derivative = row.softcap * capped, 1 - capped.square()
    scores = scores.masked_fill(hidden, -torch.inf)
    log_sum = scores.logsumexp(-1, keepdim=True)
    if grouped.sinks is not None:
        log_sum = torch.logaddexp(log_sum, grouped.sinks.float()[..., None])
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0.0)
    weights = torch.exp(scores - log_sum)
    sizes = scores.masked_fill(hidden, 0.0).abs()
    off = off * derivative + 2 * (unit + UNIT) * sizes + 2 * UNIT * log_sum.abs()
    # A weight is at most 1, and is itself rounded.
    weights_off = (weights * torch.expm1(off.clamp(max=_LARGEST))).clamp(max=1.0) + unit * weights

    # Errors of the weights move the output towards one of the values.
    out = weights @ v
    spread = (v.amax(-2) - v.amin(-2))[:, :, None]
    out_off = (weights_off * (1 - weights)).sum(-1, keepdim=True) * spread

    # The gradient of a score is P * (d_out v - d_out out). Where a query sees few keys, or one key
    # has all the weight, v and out are nearly equal, and what is left is the rounding of both
    # products and of the stored output.
    d_weights, delta = d_out @ v.mT, (d_out * out).sum(-1, keepdim=True)
    d_scores = (d_weights - delta) * scale
    products = (d_out * out).abs()
    delta_off = unit * (_RANDOM * products.norm(dim=-1, keepdim=True) + delta.abs())
    delta_off += sum_v * products.sum(-1, keepdim=True)
    d_weights_off = unit * d_weights.abs() + sum_v * (d_out.abs() @ v.abs().mT)
    off_scores = weights * (delta_off + d_weights_off) * derivative * scale
    off_scores += d_scores.abs() * (weights_off * derivative + 2 * UNIT * weights)
    dq = off_scores @ k.abs()
    # The sums of each query head may be rounded before they are added.
    d_scores = d_scores * weights * derivative
    dk = (off_scores.mT @ q.abs() + unit * (d_scores.mT @ q).abs()).sum(1)
    dv = (weights_off.mT @ d_out.abs() + unit * (weights.mT @ d_out).abs()).sum(1)
    return out_off.flatten(0, 1), dq.flatten(0, 1), dk, dv

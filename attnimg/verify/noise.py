"""How far the gradients of a correct kernel move when the same call is made again.

Kernels add gradients up in float32 in an order that changes from call to call:

- FlashAttention-2 adds dq over the key blocks with atomicAdd (csrc/flash_attn/src/
  flash_bwd_kernel.h:678, flash-attn 2.8.3.post2);
- FlashAttention-3 and -4 do the same, and add the query heads of a group into dk and dv in the
  order of arrival (FA3 hopper/flash_api_stable.cpp:1590, dk_accum; FA4 4.0.0b36 interface.py:2696,
  which needs a semaphore only "if deterministic and qhead_per_kvhead > 1"). Read 2026-11-26.

Then the sum is multiplied by the scale and rounded to the precision of the run. Two calls of such a
kernel differ, for each element of a gradient, by at most

    2 * n * u * A + ulp(x)

n terms t are added, each itself computed the same way every time. A sum of n terms in any order is
at most (n - 1) * u * sum|t| off, to first order in u = 2**-24 (Higham, Accuracy and Stability of
Numerical Algorithms, 2nd ed., SIAM 2002, equation 4.4 with section 4.2), and rounding the product
with the scale adds u times the result: n * u * A for one order, twice that between two, where
A >= sum|t|. Rounding to nearest moves each of two numbers by half of a unit in its last place at
most, so the rounded ones are at most one ulp of the larger one further apart: one flip, at the
element's own size and not at that of the largest gradient. That is what lets a leak of a thousandth
of one token's weight show among the flips: some elements of its row are small.

A is Z |k| * scale for dq, the same with |q| summed over queries and the heads of a group for dk,
and P |d_out| for dv, with P the weights; every partial sum that a kernel may form is below it. Z
bounds the gradient of the scores as a kernel forms it, P * (d_out v - d_out out): its exact size,
and what rounding leaves where both terms are equal, as for a query that sees one key:

    Z = |dS| + P * (eps + E * u) * (|d_out| |v| + |d_out| |out|)

with eps the precision of the run, in which out was rounded, and E the size of a value. n is the
number of key blocks that hold a query's document, for dk and dv the number of query blocks that
hold a key's times the heads of a group. Blocks are taken to be of TILE tokens, a quarter of the
smallest that these kernels have: that n is too large by 4 and more leaves room for P and dS, which
kernels round to the run's precision before they form the terms (by 2**-8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnimg.verify.cases import Case
from attnimg.verify.inputs import Inputs
from attnimg.verify.reference import attention_weights, visible_keys

TILE = 16
# Half of the spacing of float32 at 1.
UNIT = 2.0**-24
# Standard deviations that a sum of roundings stays within: 6 leave 2e-9 beyond, and a proof looks
# at some 1e6 elements.
DEVIATIONS = 6.0


def sum_noise(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Bound what the order of a sum moves: 2 * n * u * A, (B, T, heads, D), float32.

    Args:
        case: a packed probe, short enough for all its rows to be compared.
        inputs: its tensors.
    """
    q, k, v, scores, weights = _attention(case, inputs)
    group = inputs.q.shape[1] // inputs.k.shape[1]
    d_out = inputs.d_out.float().transpose(1, 2)
    out = weights @ v
    (d_scores,) = torch.autograd.grad(out, scores, d_out)
    weights, out = weights.detach(), out.detach()
    rounding = torch.finfo(inputs.q.dtype).eps + v.shape[-1] * UNIT
    both = d_out.abs() @ v.abs().transpose(-1, -2) + (d_out * out).abs().sum(-1, keepdim=True)
    d_scores = (d_scores.abs() + weights * rounding * both) * inputs.scale
    sizes = {
        "dq": d_scores @ k.abs(),
        "dk": d_scores.transpose(-1, -2) @ q.abs(),
        "dv": weights.transpose(-1, -2) @ d_out.abs(),
    }
    # A document may begin within a block: one more.
    blocks = -(-max(case.lengths) // TILE) + 1
    for name in ("dk", "dv"):
        sizes[name] = sizes[name].unflatten(1, (-1, group)).sum(2)
    terms = {"dq": blocks, "dk": blocks * group, "dv": blocks * group}
    return {name: 2 * terms[name] * UNIT * size.transpose(1, 2) for name, size in sizes.items()}


def rounding_of_output(case: Case, inputs: Inputs) -> dict[str, float]:
    """Bound what the rounding of the output moves dq and dk by: largest element of each.

    A flash kernel forms the gradient of the scores as P * (d_out v - d_out out) from the output
    that it stored, in the precision of the run. Rounding moves each value of it by at most u times
    the value, with u half the spacing at 1, and by u / sqrt(3) times it as a standard deviation.
    The roundings of a row are taken to be independent, so that d_out out is off by at most
    DEVIATIONS * u / sqrt(3) * |d_out * out|, the norm over the head size. Source of the model:
    Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput.
    41(5), 2019. Plain attention stores no such output. In a call of few tokens none of its other
    roundings need be as large, so that its own error is no measure there.

    Args:
        case: a probe of as many queries as keys.
        inputs: its tensors.
    """
    q, k, v, _, weights = _attention(case, inputs)
    return rounding_through(
        q,
        k,
        v,
        weights.detach(),
        d_out=inputs.d_out.float().transpose(1, 2),
        scale=inputs.scale,
        unit=torch.finfo(inputs.q.dtype).eps / 2,
        group=inputs.q.shape[1] // inputs.k.shape[1],
    )


def rounding_through(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    d_out: Tensor,
    scale: float,
    unit: float,
    group: int,
) -> dict[str, float]:
    """Return bounds on the change of dq and dk by rounding the output; see rounding_of_output.

    Args:
        q: (..., H, T, D), as wide as d_out.
        k: of each query head, (..., H, S, D).
        v: of each query head, (..., H, S, E).
        weights: of the attention, (..., H, T, S).
        d_out: (..., H, T, E).
        scale: factor on q @ k.
        unit: half of the spacing at 1 in the precision of the output.
        group: query heads to a key head.
    """
    products = d_out * (weights @ v)
    off = DEVIATIONS * unit / 3**0.5 * products.square().sum(-1, keepdim=True).sqrt()
    off_scores = weights * off * scale
    dk = off_scores.transpose(-1, -2) @ q.abs()
    dk = dk.unflatten(-3, (-1, group)).sum(-3)
    return {"dq": (off_scores @ k.abs()).max().item(), "dk": dk.max().item()}


def _attention(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v of each query head, the scores with a graph, and the weights, float32."""
    group = inputs.q.shape[1] // inputs.k.shape[1]
    q, k, v = (x.detach().float() for x in (inputs.q, inputs.k, inputs.v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    places = torch.arange(q.shape[2], device=q.device)
    scores = (q @ k.transpose(-1, -2) * inputs.scale).requires_grad_()
    weights = attention_weights(
        scores,
        visible=visible_keys(inputs.documents, places=places, window=case.geometry.window),
        softcap=case.geometry.softcap,
        sinks=None if inputs.sinks is None else inputs.sinks.detach().float(),
    )
    return q, k, v, scores, weights


def beyond_a_flip(one: Tensor, other: Tensor) -> Tensor:
    """Return by how much two roundings differ beyond one unit in the last place, float64."""
    kind = torch.finfo(one.dtype)
    wide, other_wide = one.double(), other.double()
    _, exponent = torch.frexp(torch.maximum(wide.abs(), other_wide.abs()))
    # frexp's mantissa is below 1.
    ulp = torch.ldexp(torch.full_like(wide, kind.eps), exponent - 1).clamp_min(kind.eps * kind.tiny)
    return ((wide - other_wide).abs() - ulp).clamp_min(0.0)

"""Draw q, k and v so that a missing key or a key that should be masked changes the output clearly.

Random scores hide faults: among 2000 keys of equal weight, one too many changes the output by less
than bfloat16 rounds. Here each query has half of its weight on each of two of these keys: its own,
the oldest that it sees, and one between. The keys just outside of what it may see would take most
of its weight if the mask did not hide them.
Letters: B batch, T query tokens, S key tokens, H query heads, G key heads, D head size of q and k,
E head size of v.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from attnimg.verification.cases import Case

# Size of the scores where all keys should have about the same weight.
FLAT = 0.5
# Outliers of v, as in trained models, in the probes of large scores.
OUTLIER, OUTLIER_SHARE = 40.0, 0.05
# Outliers of v in the probes of large values; in float16 the sums of the gradients must not
# overflow.
LARGE_V = {"float32": 1000.0, "bfloat16": 1000.0, "float16": 200.0}
# Scores of the keys that a query sees. The two highest share the weight: with all weight on one
# key, q and k would have no gradient. Keys that the mask hides have a higher score than these.
_STEPS = (60, 120, 180, 240, 300, 360, 420, 478, 480)
_HIDDEN = 600
# In the probes of zeros, q is 0 at every 3rd token, k at every 5th and v at every 7th, so that all
# three are 0 at some.
ZERO_EVERY = (3, 5, 7)
# Numbers of queries whose output has a gradient and is compared in long probes: the reference then
# costs rows * keys instead of keys ** 2.
FIRST, LAST, BETWEEN = 32, 64, 96
# The same for probes with all heads of a run, whose cost grows with the heads.
_FIRST, _LAST, _BETWEEN = 16, 32, 48


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The tensors of one call.

    Attributes:
        q: (B, H, T, D) in the run's precision, in the memory layout of the case.
        k: (B, G, S, D).
        v: (B, G, S, E).
        sinks: (H,) or None.
        documents: which document a key belongs to, (B, S); -1 for padding.
        rows: the queries that are compared, indices into T.
        d_out: gradient of the output, (B, T, H, E); zero outside of `rows` and on padding.
        scale: factor on q @ k.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    documents: Tensor
    rows: Tensor
    d_out: Tensor
    scale: float


def draw(case: Case, *, device: str) -> Inputs:
    """Draw the inputs of a case; they are equal on all machines up to rounding."""
    geometry = case.geometry
    # zlib.crc32, because Python's hash of a string differs from process to process.
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    documents = _documents(case)
    n_rows, n_keys = documents.shape
    n_queries = case.queries or n_keys
    scale = geometry.head_dim_qk**-0.5 * case.scale_factor
    shape_k = (n_rows, geometry.kv_heads, n_keys, geometry.head_dim_qk)
    # The random numbers are drawn on the CPU; the inputs are computed from them on the device.
    k, v, direction = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        for shape in (
            shape_k,
            (*shape_k[:-1], geometry.head_dim_v),
            (geometry.head_dim_qk,),
        )
    )
    strength = 3.0 + math.log(n_keys)
    if case.scores == "near-cap":
        strength = geometry.softcap or strength
    if case.scores == "flat":
        # Values of about 1, so that sums grow with every key.
        strength, v = FLAT, v + 1.0
    # The spacing of bfloat16 is 1 from 128 to 256: beyond that, plain attention is too inexact.
    shift = {"negative": -120.0, "large": 180.0, "below-hundreds": -900.0}.get(case.scores, 0.0)
    direction = torch.nn.functional.normalize(direction, dim=0)
    # Without the component of k along `direction`, the shift below is the same for all scores.
    k -= (k @ direction)[..., None] * direction
    if case.scores == "large":
        v *= torch.where(_some(v, OUTLIER_SHARE, generator), OUTLIER, 1.0)
    if case.scores == "large-v":
        v *= torch.where(_some(v, OUTLIER_SHARE, generator), LARGE_V[geometry.dtype], 1.0)
    documents = documents.to(device)
    if case.scores in ("hundreds", "below-hundreds"):
        steps = _stepped(case, k, documents, generator) / scale
        q = steps / 2 if case.scores == "below-hundreds" else steps
    else:
        q = _needles(case, k, documents, n_queries=n_queries) * (strength / scale)
    if case.scores == "zero-tokens":
        for x, every in zip((q, k, v), ZERO_EVERY, strict=True):
            x[:, :, ::every] = 0.0
    size = math.sqrt(abs(shift) / scale)
    q += math.copysign(size, shift) * direction
    k += size * direction
    sinks = None
    if geometry.sinks:
        sinks = shift + strength + torch.randn(geometry.heads, generator=generator).double()
    rows = _rows(n_queries, generator, few=bool(case.also_learning))
    if case.scores == "flat":  # the first rows see few keys, and are large
        rows = torch.arange(max(0, n_queries - LAST), n_queries)
    compared = torch.randn(
        (n_rows, len(rows), geometry.heads, geometry.head_dim_v), generator=generator
    )
    d_out = torch.zeros(n_rows, n_queries, *compared.shape[2:], device=device)
    d_out[:, rows.to(device)] = (compared * case.gradient_scale).to(device)
    d_out *= (documents[:, n_keys - n_queries :] >= 0)[:, :, None, None]
    dtype = getattr(torch, geometry.dtype)
    q, k, v = _laid_out(case, *(x.to(device, dtype) for x in (q, k, v)))
    return Inputs(
        q=q,
        k=k,
        v=v,
        sinks=None if sinks is None else sinks.to(device, dtype),
        documents=documents,
        rows=rows.to(device),
        d_out=d_out.to(device, dtype),
        scale=scale,
    )


def _documents(case: Case) -> Tensor:
    """Return the document number of each token: packed into one row, or one padded row each."""
    if case.packed:
        lengths = torch.tensor(case.lengths)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    width = max(case.lengths)
    return torch.stack(
        [torch.where(torch.arange(width) < length, 0, -1) for length in case.lengths]
    )


def _needles(case: Case, k: Tensor, documents: Tensor, *, n_queries: int) -> Tensor:
    """Return queries whose scores with the chosen keys are 1 at scale 1; (B, H, T, D)."""
    geometry = case.geometry
    needle = k / k.square().sum(-1, keepdim=True)
    needle = needle.repeat_interleave(geometry.heads // geometry.kv_heads, dim=1)
    n_rows, n_keys = documents.shape
    q = torch.zeros_like(needle[:, :, :n_queries])
    place_T = torch.arange(n_keys - n_queries, n_keys, device=k.device)
    head_H = torch.arange(geometry.heads, device=k.device)
    for row in range(n_rows):
        first_T, oldest_T = _oldest(documents[row], place_T, window=geometry.window)
        between_T = (oldest_T + place_T) // 2
        seen = torch.stack([place_T, oldest_T, between_T])
        if case.scores == "neighbours":
            seen = torch.stack([torch.maximum(place_T - n, oldest_T) for n in range(3)])
        hidden = [place_T + 1, oldest_T - 1, first_T - 1]
        turn_HT = head_H[:, None] + place_T
        for kind in range(2):
            target_HT = seen[(turn_HT + kind) % 3, place_T - place_T[0]]
            q[row] += needle[row, head_H[:, None], target_HT]
        for target_T in hidden:
            exists_T = (target_T >= 0) & (target_T < n_keys)
            q[row] += needle[row, :, target_T.clamp(0, n_keys - 1)] * exists_T[:, None]
    return q


def _stepped(case: Case, k: Tensor, documents: Tensor, generator: torch.Generator) -> Tensor:
    """Return queries whose scores are _STEPS, each with a random visible key; (B, H, T, D)."""
    geometry = case.geometry
    needle = k / k.square().sum(-1, keepdim=True)
    needle = needle.repeat_interleave(geometry.heads // geometry.kv_heads, dim=1)
    q = torch.zeros_like(needle)
    n_keys = documents.shape[1]
    place_T = torch.arange(n_keys, device=k.device)
    for row in range(len(documents)):
        first_T, oldest_T = _oldest(documents[row], place_T, window=geometry.window)
        for step in _STEPS:
            share_T = torch.rand(n_keys, generator=generator).to(k.device)
            q[row] += step * needle[row, :, oldest_T + (share_T * (place_T - oldest_T + 1)).long()]
        for target_T in (place_T + 1, oldest_T - 1, first_T - 1):
            exists_T = (target_T >= 0) & (target_T < n_keys)
            hidden = needle[row, :, target_T.clamp(0, n_keys - 1)]
            q[row] += _HIDDEN * hidden * exists_T[:, None]
    return q


def _oldest(own: Tensor, place_T: Tensor, *, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the first key of each query's document, and the oldest key that the query sees."""
    first_T = torch.searchsorted(own.abs(), own.abs()[place_T])
    if window is None:
        return first_T, first_T
    return first_T, torch.maximum(first_T, place_T - window + 1)


def _some(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask of a random share of a tensor's values."""
    return (torch.rand(x.shape, generator=generator) < share).to(x.device)


def _rows(n_queries: int, generator: torch.Generator, *, few: bool) -> Tensor:
    first, last, n_between = (_FIRST, _LAST, _BETWEEN) if few else (FIRST, LAST, BETWEEN)
    if n_queries <= 2 * (first + last + n_between):
        return torch.arange(n_queries)
    between = torch.randperm(n_queries - first - last, generator=generator)[:n_between] + first
    ends = (torch.arange(first), torch.arange(n_queries - last, n_queries))
    return torch.cat([ends[0], between.sort().values, ends[1]])


def _laid_out(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v laid out in memory as models do; shapes and values stay."""
    if case.layout == "heads-first":
        return q.contiguous(), k.contiguous(), v.contiguous()
    tokens_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    if case.layout == "mixed":
        wide = torch.cat([tokens_first[2]] * 2, dim=2)
        v = wide[:, :, : v.shape[1]].transpose(1, 2)
        return q.contiguous(), tokens_first[1].transpose(1, 2), v
    equal = q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]
    if case.layout == "fused" and equal:
        heads = [q.shape[1], k.shape[1], v.shape[1]]
        tokens_first = list(torch.cat(tokens_first, dim=2).split(heads, dim=2))
    q, k, v = (x.transpose(1, 2) for x in tokens_first)
    return q, k, v

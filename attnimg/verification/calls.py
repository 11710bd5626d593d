"""Run the attention call of a case: with a backend, as a model calls it, or with the reference.

Letters: B batch, T query tokens, S key tokens, H query heads, E head size of v.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnimg.facts import AttentionFunction, Backend
from attnimg.verification.blocks import RowAttention, document_spans
from attnimg.verification.cases import Case
from attnimg.verification.random_state import draw_and_read_states, is_rewound

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
# three are 0 at some. Every 10 tokens, k is 0 at the next one too: a key equal to its neighbour.
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


def draw_inputs(case: Case, *, device: str) -> Inputs:
    """Draw the inputs of a case; they are equal on all machines up to rounding."""
    geometry = case.geometry
    # zlib.crc32, because Python's hash of a string differs from process to process.
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    documents = _number_documents(case)
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
        v *= torch.where(_random_mask(v, OUTLIER_SHARE, generator), OUTLIER, 1.0)
    if case.scores == "large-v":
        v *= torch.where(_random_mask(v, OUTLIER_SHARE, generator), LARGE_V[geometry.dtype], 1.0)
    documents = documents.to(device)
    if case.scores in ("hundreds", "below-hundreds"):
        steps = _step_queries(case, k, documents, generator) / scale
        q = steps / 2 if case.scores == "below-hundreds" else steps
    else:
        q = _aim_queries(case, k, documents, n_queries=n_queries) * (strength / scale)
    if case.scores == "zero-tokens":
        for x, every in zip((q, k, v), ZERO_EVERY, strict=True):
            x[:, :, ::every] = 0.0
        k[:, :, 1::10] = 0.0
    size = math.sqrt(abs(shift) / scale)
    q += math.copysign(size, shift) * direction
    k += size * direction
    sinks = None
    if geometry.sinks:
        sinks = shift + strength + torch.randn(geometry.heads, generator=generator).double()
    rows = _choose_rows(n_queries, generator, few=bool(case.extra_gradients))
    if case.scores == "flat":  # the first rows see few keys, and are large
        rows = torch.arange(max(0, n_queries - LAST), n_queries)
    compared = torch.randn(
        (n_rows, len(rows), geometry.heads, geometry.head_dim_v), generator=generator
    )
    d_out = torch.zeros(n_rows, n_queries, *compared.shape[2:], device=device)
    d_out[:, rows.to(device)] = (compared * case.gradient_scale).to(device)
    d_out *= (documents[:, n_keys - n_queries :] >= 0)[:, :, None, None]
    dtype = getattr(torch, geometry.dtype)
    q, k, v = _apply_layout(case, *(x.to(device, dtype) for x in (q, k, v)))
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


def _number_documents(case: Case) -> Tensor:
    """Return the document number of each token: packed into one row, or one padded row each."""
    if case.packed:
        lengths = torch.tensor(case.lengths)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None]
    width = max(case.lengths)
    return torch.stack(
        [torch.where(torch.arange(width) < length, 0, -1) for length in case.lengths]
    )


def _aim_queries(case: Case, k: Tensor, documents: Tensor, *, n_queries: int) -> Tensor:
    """Return queries whose scores with the chosen keys are 1 at scale 1; (B, H, T, D)."""
    geometry = case.geometry
    directions = _score_directions(case, k)
    n_rows, n_keys = documents.shape
    q = torch.zeros_like(directions[:, :, :n_queries])
    place_T = torch.arange(n_keys - n_queries, n_keys, device=k.device)
    head_H = torch.arange(geometry.heads, device=k.device)
    for row in range(n_rows):
        first_T, oldest_T = _oldest_visible(documents[row], place_T, window=geometry.window)
        between_T = (oldest_T + place_T) // 2
        seen = torch.stack([place_T, oldest_T, between_T])
        if case.scores == "neighbours":
            seen = torch.stack([torch.maximum(place_T - n, oldest_T) for n in range(3)])
        hidden = [place_T + 1, oldest_T - 1, first_T - 1]
        turn_HT = head_H[:, None] + place_T
        for kind in range(2):
            target_HT = seen[(turn_HT + kind) % 3, place_T - place_T[0]]
            q[row] += directions[row, head_H[:, None], target_HT]
        for target_T in hidden:
            exists_T = (target_T >= 0) & (target_T < n_keys)
            q[row] += directions[row, :, target_T.clamp(0, n_keys - 1)] * exists_T[:, None]
    return q


def _step_queries(case: Case, k: Tensor, documents: Tensor, generator: torch.Generator) -> Tensor:
    """Return queries whose scores are _STEPS, each with a random visible key; (B, H, T, D)."""
    geometry = case.geometry
    directions = _score_directions(case, k)
    q = torch.zeros_like(directions)
    n_keys = documents.shape[1]
    place_T = torch.arange(n_keys, device=k.device)
    for row in range(len(documents)):
        first_T, oldest_T = _oldest_visible(documents[row], place_T, window=geometry.window)
        for step in _STEPS:
            share_T = torch.rand(n_keys, generator=generator).to(k.device)
            q[row] += (
                step * directions[row, :, oldest_T + (share_T * (place_T - oldest_T + 1)).long()]
            )
        for target_T in (place_T + 1, oldest_T - 1, first_T - 1):
            exists_T = (target_T >= 0) & (target_T < n_keys)
            hidden = directions[row, :, target_T.clamp(0, n_keys - 1)]
            q[row] += _HIDDEN * hidden * exists_T[:, None]
    return q


def _score_directions(case: Case, k: Tensor) -> Tensor:
    """Return for each query head and key the vector whose product with the key is 1."""
    directions = k / k.square().sum(-1, keepdim=True)
    return directions.repeat_interleave(case.geometry.heads // case.geometry.kv_heads, dim=1)


def _oldest_visible(own: Tensor, place_T: Tensor, *, window: int | None) -> tuple[Tensor, Tensor]:
    """Return the first key of each query's document, and the oldest key that the query sees."""
    first_T = torch.searchsorted(own.abs(), own.abs()[place_T])
    if window is None:
        return first_T, first_T
    return first_T, torch.maximum(first_T, place_T - window + 1)


def _random_mask(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Return a mask of a random share of a tensor's values."""
    return (torch.rand(x.shape, generator=generator) < share).to(x.device)


def _choose_rows(n_queries: int, generator: torch.Generator, *, few: bool) -> Tensor:
    first, last, n_between = (_FIRST, _LAST, _BETWEEN) if few else (FIRST, LAST, BETWEEN)
    if n_queries <= 2 * (first + last + n_between):
        return torch.arange(n_queries)
    between = torch.randperm(n_queries - first - last, generator=generator)[:n_between] + first
    ends = (torch.arange(first), torch.arange(n_queries - last, n_queries))
    return torch.cat([ends[0], between.sort().values, ends[1]])


def _apply_layout(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v laid out in memory as models do; shapes and values stay."""
    equal = q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]
    if case.layout == "fused" and equal:
        heads = [q.shape[1], k.shape[1], v.shape[1]]
        fused = torch.cat([x.transpose(1, 2) for x in (q, k, v)], dim=2).split(heads, dim=2)
        q, k, v = (x.transpose(1, 2) for x in fused)
        return q, k, v
    equals = {"fused": "ttt", "heads-first": "hhh", "tokens-first": "ttt"}
    letters = equals.get(case.layout, case.layout)
    q, k, v = (_store(x, letter) for x, letter in zip((q, k, v), letters, strict=True))
    return q, k, v


def _store(x: Tensor, letter: str) -> Tensor:
    """Return a tensor (B, H, T, D) stored as a letter of Layout names it."""
    if letter == "h":
        return x.contiguous()
    by_token = x.transpose(1, 2).contiguous()
    if letter == "p":
        by_token = torch.cat([by_token] * 2, dim=2)[:, :, : x.shape[1]]
    return by_token.transpose(1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The result of a call.

    Attributes:
        out: (B, T, H, E); from the reference, only the compared rows.
        gradients: "dq", "dk", "dv" and "dsinks" -> tensor; None where a gradient is missing.
        attached: whether the output is attached to the autograd graph.
        overwritten: names of the inputs that the call changed in place.
        dsinks_terms: each query's contribution to dsinks, (B, H, T); from the reference only.
    """

    out: Tensor
    gradients: dict[str, Tensor | None]
    attached: bool = True
    overwritten: tuple[str, ...] = ()
    dsinks_terms: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPass:
    """A call between its forward and its backward pass.

    Attributes:
        out: (B, T, H, E), with its graph.
        leaves: "dq" and so on -> the leaf tensor whose gradient it is.
        d_out: gradient of the output, in the memory layout in which it arrives.
        copies: name of an input -> the input, and a copy of it from before the call.
        overwritten: names of the inputs that the forward pass changed.
        reseeded: whether the forward pass seeded or rewound torch's random number generators.
        dropout: the rate of the call; at 0, neither pass needs random numbers.
    """

    out: Tensor
    leaves: dict[str, Tensor]
    d_out: Tensor
    copies: dict[str, tuple[Tensor, Tensor]]
    overwritten: tuple[str, ...]
    reseeded: bool
    dropout: float


class Probe(NamedTuple):
    """A case with its inputs, and the backend that is called with them."""

    function: AttentionFunction
    backend: Backend
    case: Case
    inputs: Inputs


class _Layer(nn.Module):  # type: ignore[misc]  # mypy does not follow torch
    """A stand-in for a model's attention layer, with the attributes that backends read."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.is_causal = True
        self.layer_idx = 0
        self.projection = nn.Linear(1, 1, dtype=dtype)


ALL = ("dq", "dk", "dv", "dsinks")


def call(probe: Probe) -> Result:
    """Run a backend's forward and backward pass, with the arguments that a model would pass.

    Raises:
        Exception: whatever the kernel raises.
    """
    return backward(forward(probe))


def forward(
    probe: Probe, *, dropout: float = 0.0, needs_grad: tuple[str, ...] = ALL
) -> ForwardPass:
    """Run a backend's forward pass; `needs_grad` names the gradients that will be requested."""
    function, backend, case, inputs = probe
    named = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v}
    if inputs.sinks is not None:
        named["dsinks"] = inputs.sinks
    # detach() keeps the strides, which the probe tests as well.
    leaves = {name: x.detach().requires_grad_(name in needs_grad) for name, x in named.items()}
    arguments = _arguments(backend, case, inputs, sinks=leaves.get("dsinks"))
    d_out = _d_out(case, inputs)
    given = {name[1:]: leaf.detach() for name, leaf in leaves.items()} | {"d_out": d_out}
    given |= {name: value for name, value in arguments.items() if name.startswith("cu_seq_lens")}
    copies = {name: (value, value.clone()) for name, value in given.items()}
    # Built before the generators' states are read, since initializing a layer draws numbers.
    layer, mask = _Layer(inputs.q.dtype).to(inputs.q.device), _mask(backend, case, inputs)
    random = draw_and_read_states(inputs.q.device)
    autocast = case.geometry.autocast
    dtype = getattr(torch, case.geometry.dtype) if autocast else None
    with torch.autocast(inputs.q.device.type, dtype, enabled=autocast):
        qkv = (leaves[name] for name in ("dq", "dk", "dv"))
        out, _ = function(layer, *qkv, mask, dropout=dropout, **arguments)
    return ForwardPass(
        out=out,
        leaves=leaves,
        d_out=d_out,
        copies=copies,
        overwritten=_changed(copies),
        reseeded=not dropout and is_rewound(random, inputs.q.device),
        dropout=dropout,
    )


def forward_only(started: ForwardPass) -> Result:
    """Return the result of a call without a backward pass."""
    return Result(out=started.out.detach(), gradients={}, overwritten=_overwritten(started))


def backward(started: ForwardPass) -> Result:
    """Run the backward pass of a call, and return its result."""
    out, d_out = started.out, started.d_out
    leaves = {name: leaf for name, leaf in started.leaves.items() if leaf.requires_grad}
    gradients: dict[str, Tensor | None] = dict.fromkeys(leaves)
    random = draw_and_read_states(d_out.device)
    if out.shape == d_out.shape and out.requires_grad:
        found = torch.autograd.grad(
            out, list(leaves.values()), d_out.to(out.dtype), allow_unused=True
        )
        gradients = dict(zip(leaves, found, strict=True))
    reseeded = not started.dropout and is_rewound(random, d_out.device)
    return Result(
        out=out.detach(),
        gradients=gradients,
        attached=out.requires_grad,
        overwritten=_overwritten(started, reseeded=reseeded),
    )


def _overwritten(started: ForwardPass, *, reseeded: bool = False) -> tuple[str, ...]:
    """Return the names of the inputs that a call wrote to, in its forward pass or later."""
    names = started.overwritten or _changed(started.copies)
    if started.reseeded or reseeded:
        names = (*names, "torch's random numbers")
    return names


def _changed(copies: dict[str, tuple[Tensor, Tensor]]) -> tuple[str, ...]:
    return tuple(name for name, (value, copy) in copies.items() if not torch.equal(value, copy))


def _d_out(case: Case, inputs: Inputs) -> Tensor:
    """Return d_out stored by tokens, or by heads, as it arrives where the next layer transposes."""
    d_out = inputs.d_out
    if 0 in d_out.stride() or case.layout == "fused":
        return d_out
    return d_out.transpose(1, 2).contiguous().transpose(1, 2)


def _arguments(
    backend: Backend, case: Case, inputs: Inputs, *, sinks: Tensor | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"scaling": inputs.scale}
    if case.geometry.window is not None:
        arguments["sliding_window"] = case.geometry.window
    if case.geometry.softcap is not None:
        arguments["softcap"] = case.geometry.softcap
    if sinks is not None:
        arguments["s_aux"] = sinks
    if case.queries is None:
        arguments["position_ids"] = _positions(inputs.documents)
    if case.packed and backend.mask == "flash":
        lengths = torch.tensor((0, *case.lengths), device=inputs.q.device)
        ends = lengths.cumsum(0).to(torch.int32)
        longest = max(case.lengths) + case.max_length_slack
        for side in "qk":
            # Two tensors, as after moving a batch to a GPU, or the same tensor twice.
            arguments[f"cu_seq_lens_{side}"] = ends if case.layout == "fused" else ends.clone()
            arguments[f"max_length_{side}"] = longest
    return arguments


def _positions(documents: Tensor) -> Tensor:
    """Return the position of each token within its document, (B, S)."""
    place_S = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return place_S - torch.where(begins, place_S, 0).cummax(1).values


def _mask(backend: Backend, case: Case, inputs: Inputs) -> Any:
    """Build the attention_mask that transformers would hand to this backend."""
    padded = bool((inputs.documents < 0).any())
    n_keys, n_queries = inputs.k.shape[2], inputs.q.shape[2]
    if backend.mask == "flash":
        return (inputs.documents >= 0) if padded else None
    window = case.geometry.window
    # For such calls transformers passes no mask to sdpa, which then uses is_causal.
    plain = not padded and not case.packed and n_keys == n_queries
    if backend.mask == "sdpa" and plain and (window is None or window >= n_keys):
        return None
    places = torch.arange(n_keys - n_queries, n_keys, device=inputs.q.device)
    seen = visible_keys(inputs.documents, places=places, window=window)
    if padded:
        # A query on padding sees no key, so its output would be NaN: transformers lets it see
        # itself.
        itself = places[:, None] == torch.arange(n_keys, device=places.device)
        seen |= itself & ~seen.any(-1, True)
    if backend.mask == "eager":
        lowest = torch.finfo(inputs.q.dtype).min
        return torch.zeros_like(seen, dtype=inputs.q.dtype).masked_fill(~seen, lowest)
    if backend.mask == "flex":
        from torch.nn.attention.flex_attention import create_block_mask

        def look_up(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            del head
            return seen[batch, 0, query, key]

        n_rows = len(inputs.documents)
        return create_block_mask(look_up, n_rows, None, n_queries, n_keys, device=seen.device)
    return seen


def each_row(case: Case, inputs: Inputs) -> Iterator[RowAttention]:
    """Yield the rows of the batch of a call; the last query is at the last key."""
    device, n_keys = inputs.q.device, inputs.k.shape[2]
    places = torch.arange(n_keys - inputs.q.shape[2], n_keys, device=device)
    for row in range(len(inputs.q)):
        lengths = case.lengths if case.packed else case.lengths[row : row + 1]
        cu_seqlens = torch.tensor((0, *lengths), device=device).cumsum(0)
        first_T, last_T = document_spans(cu_seqlens, places, window=case.geometry.window)
        yield RowAttention(
            q=inputs.q[row],
            k=inputs.k[row],
            v=inputs.v[row],
            d_out=inputs.d_out[row].transpose(0, 1),
            sinks=inputs.sinks,
            first_T=first_T,
            last_T=last_T,
            scale=inputs.scale,
            softcap=case.geometry.softcap,
        )


def visible_keys(documents: Tensor, *, places: Tensor, window: int | None) -> Tensor:
    """Return which keys each query sees: those of its document, not later ones, within its window.

    Args:
        documents: which document each key belongs to, int, (B, S); below 0 for padding.
        places: the position of each query among the keys, int, (T,). The last query of a call is
            at the last key (bottom-right alignment).
        window: keys that a query sees, its own included; None for all.

    Returns:
        Bool, (B, 1, T, S).
    """
    place_S = torch.arange(documents.shape[1], device=documents.device)
    behind_TS = places[:, None] - place_S[None, :]
    seen_TS = behind_TS >= 0
    if window is not None:
        seen_TS &= behind_TS < window
    of_query = documents[:, places, None]
    same_BTS = (of_query == documents[:, None, :]) & (of_query >= 0)
    return (seen_TS & same_BTS)[:, None]

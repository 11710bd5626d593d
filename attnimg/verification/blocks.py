"""Compute attention of one row block by block, for chosen tokens, with little memory.

Plain attention of a long row stores heads * tokens ** 2 scores. Here one tile of queries and keys
is computed at a time, so that the memory does not grow with the row. Only the requested queries,
and those that see a requested key, are computed. torch's attention functions are not used.
Letters: T query and key tokens, H query heads, G key heads, R query heads to a key head, D head
size of q and k, E head size of v.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnimg.backends._varlen import AttentionCall, packed_tokens

# Tokens (begin, end) of a row.
Span = tuple[int, int]

# Arrays as large as a tile of scores that are in memory at once: scores, weights, the gradients of
# both, the derivative of the soft cap, and the mask.
_ARRAYS = 6

_TILE_Q, _TILE_K = 256, 2048

# Up to this many tokens, a single tile is faster: half of its scores are masked, but none is
# computed twice.
_ONE_TILE = 1024

_SMALLEST = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockReference:
    """The outputs and gradients of attention at the requested tokens, in the requested order.

    Attributes:
        out: (H, queries, E).
        dq: (H, queries, D); None without d_out.
        dk: (G, keys, D), from the outputs of the whole row; None without d_out.
        dv: (G, keys, E), likewise.
    """

    out: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAttention:
    """The attention of one row, in which each query sees one contiguous span of keys.

    Attributes:
        q: (H, T, D), in any precision and memory layout.
        k: (G, T, D), H a multiple of G.
        v: (G, T, E).
        d_out: gradient of the output, (H, T, E); None for no gradients.
        sinks: a logit for each head that joins the softmax and has no value, (H,).
        first_T: the first key that each query sees, int64, (T,).
        last_T: the key after the last one that it sees, int64, (T,).
        scale: factor on q @ k.
        softcap: scores become softcap * tanh(scores / softcap).
        dtype: the precision of the sums.
        rounded_to: the precision in which plain attention stores its scores, weights, their
            gradients and its results; None to round nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor | None = None
    sinks: Tensor | None = None
    first_T: Tensor
    last_T: Tensor
    scale: float
    softcap: float | None = None
    dtype: torch.dtype = torch.float64
    rounded_to: torch.dtype | None = None

    def grouped(self) -> RowAttention:
        """Return the row with its query heads by key head: q (G, R, T, D), k (G, 1, T, D)."""
        n_groups, sinks = len(self.k), self.sinks
        return replace(
            self,
            q=self.q.unflatten(0, (n_groups, -1)),
            k=self.k[:, None],
            v=self.v[:, None],
            d_out=None if self.d_out is None else self.d_out.unflatten(0, (n_groups, -1)),
            sinks=None if sinks is None else sinks.to(self.dtype).view(n_groups, -1, 1),
        )

    def round(self, x: Tensor) -> Tensor:
        """Round an intermediate result to the dtype `rounded_to`, if there is one."""
        return x if self.rounded_to is None else x.to(self.rounded_to).to(self.dtype)


def block_reference(
    row: RowAttention,
    *,
    queries: Sequence[Span],
    keys: Sequence[Span],
    at_most_bytes: int = 256 << 20,
) -> BlockReference:
    """Compute the attention of a row block by block, for chosen queries and keys.

    Args:
        row: the inputs.
        queries: spans whose out and dq are returned. They must not overlap.
        keys: spans whose dk and dv are returned. All queries that see one of them are computed.
        at_most_bytes: limit on the memory for intermediate results, not counting the returned
            results and two numbers for each query head and token.
    """
    row = row.grouped()
    n_kv_heads = len(row.k)
    heads, tile_q, tile_k = _tiles(row, at_most_bytes, whole=_is_whole(row, queries, keys))
    parts = [
        _attend_heads(row, slice(begin, begin + heads), queries, keys, tile_q=tile_q, tile_k=tile_k)
        for begin in range(0, n_kv_heads, heads)
    ]
    out, dq, dk, dv = (
        None if found[0] is None else torch.cat(found) for found in zip(*parts, strict=True)
    )
    assert out is not None
    dq = None if dq is None else dq.flatten(0, 1)
    return BlockReference(out=out.flatten(0, 1), dq=dq, dk=dk, dv=dv)


def document_spans(
    cu_seqlens: Tensor, places: Tensor, *, window: int | None, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the first key that each query sees within its document, and the one after the last.

    Args:
        cu_seqlens: the start of each document, and the end of the last one, int, (documents + 1,).
            Tokens after that are padding, and see no keys.
        places: the positions of the queries, int64, (T,).
        window: number of keys that a query sees, its own included; to either side if not causal.
        causal: whether a query sees no later key.
    """
    ends = cu_seqlens.to(places.dtype)
    document = torch.searchsorted(ends, places, right=True).clamp(1, len(ends) - 1)
    first, last = ends[document - 1], ends[document]
    last = torch.where(places < ends[-1], last, first)
    if causal:
        last = torch.minimum(last, places + 1)
    if window is not None:
        first = torch.maximum(first, places - window + 1)
        last = torch.minimum(last, places + window)
    return first, last


def _is_whole(row: RowAttention, queries: Sequence[Span], keys: Sequence[Span]) -> bool:
    """Return whether all tokens are requested, so that one tile computes each product once."""
    return row.d_out is not None and [*queries] == [*keys] == [(0, row.q.shape[2])]


def _tiles(row: RowAttention, at_most_bytes: int, *, whole: bool) -> tuple[int, int, int]:
    """Return how many key heads, queries and keys are computed at once."""
    n_kv_heads, group, n_tokens = row.q.shape[:3]
    tile_q, tile_k = min(_TILE_Q, n_tokens), min(_TILE_K, n_tokens)
    if whole and n_tokens <= _ONE_TILE:
        tile_q = tile_k = n_tokens

    def needed() -> int:
        sizes = row.q.shape[-1] + row.v.shape[-1]
        arrays = _ARRAYS * group * tile_q * tile_k + 2 * sizes * (group * tile_q + tile_k)
        return int(arrays * row.dtype.itemsize)

    while needed() > at_most_bytes and max(tile_q, tile_k) > _SMALLEST:
        tile_q, tile_k = (tile_q, tile_k // 2) if tile_k > tile_q else (tile_q // 2, tile_k)
    return max(1, min(n_kv_heads, at_most_bytes // needed())), tile_q, tile_k


def _attend_heads(
    row: RowAttention,
    heads: slice,
    queries: Sequence[Span],
    keys: Sequence[Span],
    *,
    tile_q: int,
    tile_k: int,
) -> tuple[Tensor | None, ...]:
    """Return out, dq, dk and dv of some key heads and their query heads."""
    n_tokens = row.q.shape[2]
    if n_tokens <= min(tile_q, tile_k) and _is_whole(row, queries, keys):
        return _attend_one_tile(row, heads)
    # The logarithm of each softmax's divisor, and the sum of d_out * out: (heads, R, T).
    shape = (*row.q[heads].shape[:2], n_tokens)
    total = torch.zeros(shape, dtype=row.dtype, device=row.q.device)
    delta = torch.zeros_like(total)
    outs: dict[int, Tensor] = {}
    requested = [t for span in queries for t in _split(span, tile_q)]
    for tile in _needed_tiles(row, requested, keys, tile_q=tile_q):
        span = slice(*tile)
        total[..., span] = _log_sums(row, heads, tile, tile_k=tile_k)
        out = _output(row, heads, tile, total=total[..., span], tile_k=tile_k)
        if row.d_out is not None:
            delta[..., span] = (row.d_out[heads, :, span].to(row.dtype) * out).sum(-1)
        if tile in requested:
            outs[tile[0]] = out
    none = total.new_zeros((*shape[:2], 0, row.v.shape[-1]))
    out = torch.cat([none, *(outs[begin] for begin, _ in requested)], 2)
    if row.d_out is None:
        return out, None, None, None
    none = total.new_zeros((*shape[:2], 0, row.q.shape[-1]))
    dq = torch.cat([none, *(_dq(row, heads, t, total, delta, tile_k=tile_k) for t in requested)], 2)
    if not keys:
        return out, dq, None, None
    found = [
        _dk_dv(row, heads, tile, total, delta, tile_q=tile_q)
        for span in keys
        for tile in _split(span, tile_k)
    ]
    dk, dv = (torch.cat(x, 1) for x in zip(*found, strict=True))
    return out, dq, dk, dv


def _attend_one_tile(row: RowAttention, heads: slice) -> tuple[Tensor | None, ...]:
    """Return out, dq, dk and dv of all tokens, each product computed once."""
    assert row.d_out is not None
    span = (0, row.q.shape[2])
    q, k, v, d_out = (x[heads].to(row.dtype) for x in (row.q, row.k, row.v, row.d_out))
    scores, derivative = _scores(row, heads, span, span)
    total = scores.logsumexp(-1)
    if row.sinks is not None:
        total = torch.logaddexp(total, row.sinks[heads].expand_as(total))
    total = total.masked_fill_(total == -torch.inf, 0.0)
    weights = row.round(row.round(scores.sub_(total[..., None])).exp_())
    out = row.round(weights @ v)
    delta = (d_out * out).sum(-1)
    d_scores = _softmax_backward(row, weights, d_out @ v.transpose(-1, -2), delta, derivative)
    dq = row.round(d_scores @ k)
    dk = row.round((d_scores.transpose(-1, -2) @ q).sum(1))
    dv = row.round((weights.transpose(-1, -2) @ d_out).sum(1))
    return out, dq, dk, dv


def _needed_tiles(
    row: RowAttention, requested: Sequence[Span], keys: Sequence[Span], *, tile_q: int
) -> Iterator[Span]:
    """Yield the tiles of the requested queries, then of all others that a gradient needs."""
    yield from requested
    if row.d_out is None:
        return
    done = torch.zeros(row.q.shape[2], dtype=torch.bool)
    for begin, end in requested:
        done[begin:end] = True
    for span in keys:
        for begin, end in _split(_queries_that_see(row, span), tile_q):
            if not done[begin:end].all():
                done[begin:end] = True
                yield begin, end


def _split(span: Span, size: int) -> list[Span]:
    begin, end = span
    return [(place, min(place + size, end)) for place in range(begin, end, size)]


def _queries_that_see(row: RowAttention, keys: Span) -> Span:
    """Return the queries from the first to the last that see at least one of some keys."""
    sees_T = (row.first_T < keys[1]) & (row.last_T > keys[0])
    places = sees_T.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


def _keys_seen_by(row: RowAttention, queries: Span) -> Span:
    """Return the keys from the first to the last that at least one of some queries sees."""
    span = slice(*queries)
    return int(row.first_T[span].min()), int(row.last_T[span].max())


def _scores(
    row: RowAttention, heads: slice, queries: Span, keys: Span
) -> tuple[Tensor, Tensor | None]:
    """Return the scores of a tile, -inf where hidden, and the derivative of the soft cap."""
    q, k = (
        x[heads, :, slice(*span)].to(row.dtype) for x, span in ((row.q, queries), (row.k, keys))
    )
    scores, derivative = row.round(row.round(q @ k.transpose(-1, -2)) * row.scale), None
    if row.softcap:
        capped = row.round(torch.tanh(row.round(scores / row.softcap)))
        scores, derivative = row.round(row.softcap * capped), 1 - capped.square()
    place = torch.arange(*keys, device=scores.device)
    span = slice(*queries)
    hidden = (place < row.first_T[span, None]) | (place >= row.last_T[span, None])
    return scores.masked_fill_(hidden, -torch.inf), derivative


def _log_sums(row: RowAttention, heads: slice, queries: Span, *, tile_k: int) -> Tensor:
    """Return the logarithm of the sum that each query's softmax divides by, (heads, R, queries)."""
    shape = (*row.q[heads].shape[:2], queries[1] - queries[0])
    found = torch.full(shape, -torch.inf, dtype=row.dtype, device=row.q.device)
    if row.sinks is not None:
        found = row.sinks[heads].expand(shape).clone()
    for keys in _split(_keys_seen_by(row, queries), tile_k):
        scores, _ = _scores(row, heads, queries, keys)
        found = torch.logaddexp(found, scores.logsumexp(-1))
    # Where a query sees no key, its weights become exp(-inf - 0) = 0.
    return found.masked_fill_(found == -torch.inf, 0.0)


def _output(
    row: RowAttention, heads: slice, queries: Span, *, total: Tensor, tile_k: int
) -> Tensor:
    shape = (*total.shape, row.v.shape[-1])
    out = torch.zeros(shape, dtype=row.dtype, device=total.device)
    for keys in _split(_keys_seen_by(row, queries), tile_k):
        weights = row.round(_scores(row, heads, queries, keys)[0].sub_(total[..., None])).exp_()
        out += row.round(weights) @ row.v[heads, :, slice(*keys)].to(row.dtype)
    return row.round(out)


def _gradient_of_scores(
    row: RowAttention, heads: slice, queries: Span, keys: Span, total: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights of a tile, and the gradient of q @ k."""
    assert row.d_out is not None
    span = slice(*queries)
    scores, derivative = _scores(row, heads, queries, keys)
    weights = row.round(row.round(scores.sub_(total[..., span, None])).exp_())
    d_out, v = row.d_out[heads, :, span].to(row.dtype), row.v[heads, :, slice(*keys)].to(row.dtype)
    d_weights = d_out @ v.transpose(-1, -2)
    return weights, _softmax_backward(row, weights, d_weights, delta[..., span], derivative)


def _softmax_backward(
    row: RowAttention, weights: Tensor, d_weights: Tensor, delta: Tensor, derivative: Tensor | None
) -> Tensor:
    """Return the gradient of q @ k from that of the weights."""
    d_scores = row.round(row.round(d_weights).sub_(delta[..., None]).mul_(weights))
    if derivative is not None:
        d_scores = row.round(d_scores * derivative)
    return row.round(d_scores * row.scale)


def _dq(
    row: RowAttention, heads: slice, queries: Span, total: Tensor, delta: Tensor, *, tile_k: int
) -> Tensor:
    dq = torch.zeros_like(row.q[heads, :, slice(*queries)], dtype=row.dtype)
    for keys in _split(_keys_seen_by(row, queries), tile_k):
        _, d_scores = _gradient_of_scores(row, heads, queries, keys, total, delta)
        dq += d_scores @ row.k[heads, :, slice(*keys)].to(row.dtype)
    return row.round(dq)


def _dk_dv(
    row: RowAttention, heads: slice, keys: Span, total: Tensor, delta: Tensor, *, tile_q: int
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a tile of keys and values, added up over the query heads."""
    assert row.d_out is not None
    dk, dv = (torch.zeros_like(x[heads, 0, slice(*keys)], dtype=row.dtype) for x in (row.k, row.v))
    for queries in _split(_queries_that_see(row, keys), tile_q):
        span = slice(*queries)
        weights, d_scores = _gradient_of_scores(row, heads, queries, keys, total, delta)
        q, d_out = (x[heads, :, span].to(row.dtype) for x in (row.q, row.d_out))
        dk += (d_scores.transpose(-1, -2) @ q).sum(1)
        dv += (weights.transpose(-1, -2) @ d_out).sum(1)
    return row.round(dk), row.round(dv)


# Number of queries whose part of the mask is read at once.
_ROWS = 1024


class NotComparable(Exception):
    """Raised for a call that the reference can't compute; the message is the reason."""


def read_mask_spans(mask: Any, row: int, *, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the first key that each query of a row sees, and the key after the last one.

    Args:
        mask: the attention_mask of a call: (B or 1, 1, T, T), bool, True where a query sees a key,
            or a float that is added to the scores; or flex_attention's block mask.
        row: the index of the row in the batch.
        n_tokens: T.

    Raises:
        NotComparable: the keys that a query sees are not contiguous, or the mask adds a bias.
    """
    firsts, lasts = [], []
    for begin in range(0, n_tokens, _ROWS):
        seen = _read_visible(mask, row, begin, min(begin + _ROWS, n_tokens), n_tokens=n_tokens)
        some = seen.any(-1)
        first = seen.byte().argmax(-1)
        last = n_tokens - seen.flip(-1).byte().argmax(-1)
        if not ((last - first == seen.sum(-1)) | ~some).all():
            raise NotComparable("the attention mask hides keys between two that a query sees")
        place = torch.arange(begin, begin + len(seen), device=seen.device)
        firsts.append(torch.where(some, first, place))
        lasts.append(torch.where(some, last, place))
    return torch.cat(firsts), torch.cat(lasts)


def _read_visible(mask: Any, row: int, begin: int, end: int, *, n_tokens: int) -> Tensor:
    """Return which keys some queries see, bool (queries, T)."""
    if callable(mod := getattr(mask, "mask_mod", None)):
        device = mask.kv_num_blocks.device
        place = torch.arange(n_tokens, device=device)
        number = torch.tensor(row, device=device)
        found = mod(number, torch.zeros_like(number), place[begin:end, None], place[None])
        return torch.as_tensor(found).expand(end - begin, n_tokens)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        shape = tuple(getattr(mask, "shape", ()))
        raise NotComparable(f"the attention mask is a {type(mask).__name__} of the shape {shape}")
    part = mask[row if mask.shape[0] > 1 else 0, 0, begin:end, :n_tokens]
    if part.shape != (end - begin, n_tokens):
        raise NotComparable(f"the attention mask has the shape {tuple(mask.shape)}")
    if part.dtype == torch.bool:
        return part
    hidden = part <= torch.finfo(part.dtype).min / 2
    if ((part != 0) & ~hidden).any():
        raise NotComparable("the attention mask adds a bias to the scores")
    return ~hidden


def read_argument_spans(read: AttentionCall, row: int) -> tuple[Tensor, Tensor]:
    """Return the first key that each query of a row sees, and the key after the last one."""
    n_tokens = read.q.shape[2]
    place = torch.arange(n_tokens, device=read.q.device)
    begin, is_token = 0, None
    if read.padding is not None:
        # The tokens of a row are contiguous; padding is before or after them.
        is_token = read.padding[row, -n_tokens:]
        start = is_token.int().argmax() if is_token.any() else place[0]
        ends = torch.stack([start, start + is_token.sum()])
    elif (tokens := packed_tokens(read)) is not None:
        begin, ends = row * n_tokens, tokens.cu_seqlens_q
    else:
        ends = torch.tensor([0, n_tokens], device=place.device)
    first, last = document_spans(ends, place + begin, window=read.window, causal=read.causal)
    first, last = (first - begin).clamp(min=0), (last - begin).clamp(max=n_tokens)
    sees = last > first if is_token is None else is_token
    return torch.where(sees, first, place), torch.where(sees, last, place)


def choose_documents(
    first: Tensor, last: Tensor, *, longest: int | None, rng: random.Random
) -> slice:
    """Return the tokens to compare, which see no others: all, or the whole documents that fit."""
    n_tokens = len(first)
    if longest is None or n_tokens <= longest:
        return slice(0, n_tokens)
    # A row can be cut where no later query sees an earlier key, and no earlier query a later key.
    place = torch.arange(n_tokens, device=first.device)
    oldest = first.flip(0).cummin(0).values.flip(0)
    newest = torch.nn.functional.pad(last.cummax(0).values[:-1], (1, 0))
    cuts = [*((oldest >= place) & (newest <= place)).nonzero().flatten().tolist(), n_tokens]
    at = rng.randrange(n_tokens)
    begin = max(cut for cut in cuts if cut <= at)
    fitting = [cut for cut in cuts if begin < cut <= begin + longest]
    return slice(begin, fitting[-1] if fitting else min(cut for cut in cuts if cut > begin))

"""Check a whole row with all heads of a run: without gradients, and with a gradient at every row.

The first call of such a probe has gradients of the output only at the compared rows, so that the
cost of the reference grows with rows * keys. Here the output has a gradient at every row, as in
training, and dk and dv are compared at random blocks of keys, which the reference computes alone.

In a row of one document these gradients have the signs of the first key's v. All terms of its dk
and dv then have the same sign, and those of other keys alike ones: a sum in half precision loses
what is added last, where terms of random signs would hide it. The first key's gradients are some
hundred times those of others, and are compared apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnimg.facts import AttentionFunction, Backend, Pattern
from attnimg.prove.blocks import Span, block_reference
from attnimg.prove.calls import Result, backward, forward, forward_only
from attnimg.prove.cases import Case
from attnimg.prove.checks import Expected, Fault, check_finite, check_values, expected
from attnimg.prove.inputs import Inputs

# Tokens of a block of keys, and the number of random blocks besides the first and the last.
_BLOCK, _DRAWN = 32, 4
# Scores that the reference computes for the sampled key heads. On a GPU with a 64th of float32's
# speed in float64, 1 << 32 take a second or two.
_SCORES = {"cpu": 1 << 21, "cuda": 1 << 32}
# Terms of about 1 whose sum float16 holds, with room for larger ones.
_TERMS = 4096


def check_whole_row(
    function: AttentionFunction,
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    right: Expected,
    references: dict[tuple[Pattern, Case], Expected],
) -> Iterator[Fault]:
    """Make two more calls of a whole row.

    Args:
        function: the backend's attention.
        backend: whose bounds count.
        case: its also_learning names the gradients of the last call.
        inputs: its tensors.
        right: the reference of the first call.
        references: those of last calls; a missing one is added.

    Raises:
        Exception: whatever the kernel raises.
    """
    with torch.no_grad():
        found = forward_only(forward(function, backend, case, inputs))
    named = replace(case, name=f"{case.name}, without gradients")
    yield from check_values(backend, named, inputs, found=found, right=right)[1]
    if backend.pattern != "full":
        return
    what = " and ".join(name[1:] for name in case.also_learning)
    named = replace(case, name=f"{case.name}, gradients of {what} alone")
    one_document = max(case.lengths) == _tokens(case)
    inputs = _with_every_gradient(case, inputs, alike=one_document)
    found = backward(forward(function, backend, case, inputs, learning=case.also_learning))
    yield from check_finite(named, found)
    heads, blocks = _sampled(case)
    places = torch.cat([torch.arange(*block) for block in blocks]).to(inputs.q.device)
    gradients = {
        name: None if x is None else x[:, heads][:, :, places]
        for name, x in found.gradients.items()
    }
    parts = {"": slice(None)}
    if one_document:
        parts = {", first key": slice(0, 1), ", other keys": slice(1, None)}
    exact: list[Result] = []
    for part, keys in parts.items():
        judged = replace(named, name=f"{named.name}{part}")
        key = backend.pattern, judged
        if key not in references:
            exact = exact or _references(case, inputs, right=right, heads=heads, blocks=blocks)
            references[key] = _expected(exact, keys, right=right, alike=one_document)
        of_part = replace(found, gradients=_at_keys(gradients, keys))
        yield from check_values(backend, judged, inputs, found=of_part, right=references[key])[1]


def _at_keys(gradients: dict[str, Tensor | None], keys: slice) -> dict[str, Tensor | None]:
    return {name: None if x is None else x[:, :, keys] for name, x in gradients.items()}


def _with_every_gradient(case: Case, inputs: Inputs, *, alike: bool) -> Inputs:
    """Draw gradients of the output at every row; where `alike`, with the signs of the first v."""
    generator = torch.Generator(inputs.q.device).manual_seed(zlib.crc32(case.name.encode()))
    d_out = torch.randn(inputs.d_out.shape, generator=generator, device=inputs.q.device)
    if alike:
        group = case.geometry.heads // case.geometry.kv_heads
        first_v = inputs.v[:, :, 0].float().repeat_interleave(group, 1)
        # In float16 the sums must not overflow.
        size = min(1.0, _TERMS / (group * _tokens(case)))
        d_out = torch.copysign(d_out, first_v[:, None]) * size
    return replace(inputs, d_out=d_out.to(inputs.d_out.dtype))


def _sampled(case: Case) -> tuple[list[int], list[Span]]:
    """Choose the key heads and the blocks of keys whose gradients are compared."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name}, blocks".encode()))
    geometry, n_tokens = case.geometry, _tokens(case)
    group = geometry.heads // geometry.kv_heads
    squares = sum(n * n for n in case.lengths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_heads = min(geometry.kv_heads, max(1, _SCORES[device] // (group * squares)))
    heads = torch.randperm(geometry.kv_heads, generator=generator)[:n_heads].sort().values
    n_blocks = -(-n_tokens // _BLOCK)
    drawn = torch.randperm(n_blocks, generator=generator)[:_DRAWN].tolist()
    starts = sorted({0, n_blocks - 1, *drawn})
    blocks = [(n * _BLOCK, min((n + 1) * _BLOCK, n_tokens)) for n in starts]
    return heads.tolist(), blocks


def _tokens(case: Case) -> int:
    """Return the tokens of a row."""
    return sum(case.lengths) if case.packed else max(case.lengths)


def _references(
    case: Case, inputs: Inputs, *, right: Expected, heads: list[int], blocks: list[Span]
) -> list[Result]:
    """Return the last call in float64 and as plain attention rounds: dk and dv at some keys."""
    group = case.geometry.heads // case.geometry.kv_heads
    of_group = [head * group + place for head in heads for place in range(group)]
    lengths = case.lengths if case.packed else case.lengths[:1]
    bounds = torch.tensor((0, *lengths), device=inputs.q.device).cumsum(0)
    results = []
    for dtype, rounded_to in ((torch.float64, None), (torch.float32, inputs.q.dtype)):
        rows = [
            block_reference(
                inputs.q[row, of_group],
                inputs.k[row, heads],
                inputs.v[row, heads],
                inputs.d_out[row].transpose(0, 1)[of_group],
                cu_seqlens=bounds,
                queries=(),
                keys=blocks,
                scale=inputs.scale,
                window=case.geometry.window,
                softcap=case.geometry.softcap,
                sinks=None if inputs.sinks is None else inputs.sinks[of_group],
                dtype=dtype,
                rounded_to=rounded_to,
            )
            for row in range(len(inputs.q))
        ]
        gradients = {
            "dk": _stacked([row.dk for row in rows]),
            "dv": _stacked([row.dv for row in rows]),
        }
        results.append(Result(out=right.exact.out, gradients=gradients))
    return results


def _expected(results: list[Result], keys: slice, *, right: Expected, alike: bool) -> Expected:
    """Return what dk and dv should be at some of the keys, with the output of the first call."""
    exact, plain = (replace(x, gradients=_at_keys(x.gradients, keys)) for x in results)
    found = expected(exact, plain)
    return replace(
        found,
        rounding=found.rounding | {"out": right.rounding["out"]},
        gain=found.gain | {"out": right.gain["out"]},
        alike=alike,
    )


def _stacked(rows: list[Tensor | None]) -> Tensor:
    return torch.stack([row for row in rows if row is not None])

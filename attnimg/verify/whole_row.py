"""Check a whole row with all heads of a run: without gradients, and with a gradient at every row.

The first call of such a probe has gradients of the output only at the compared rows, so that the
cost of the reference grows with rows * keys. Here the output has a gradient at every row, as in
training, and dk and dv are compared at random blocks of keys, which the reference computes alone.

In a row of one document all these gradients of a head have the same sign in each dimension, so that
the terms of dv have it too: a sum in half precision loses what is added last, where terms of random
signs would hide it. The first key, which every query sees, has a dv some hundred times that of
others, and would hide their errors: it is left out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnimg.facts import AttentionFunction, Backend, Pattern
from attnimg.verify.blocks import Span, block_reference
from attnimg.verify.cases import Case
from attnimg.verify.checks import Expected, Fault, check_finite, check_values, expected
from attnimg.verify.inputs import Inputs
from attnimg.verify.one_call import Result, backward, forward, forward_only

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
    alike = max(case.lengths) == _tokens(case)
    inputs = _with_every_gradient(case, inputs, alike=alike)
    found = backward(forward(function, backend, case, inputs, learning=case.also_learning))
    yield from check_finite(named, found)
    heads, blocks = _sampled(case, first=1 if alike else 0)
    key = backend.pattern, named
    if key not in references:
        expectation = _expected(case, inputs, right=right, heads=heads, blocks=blocks)
        references[key] = replace(expectation, alike=alike)
    places = torch.cat([torch.arange(*block) for block in blocks]).to(inputs.q.device)
    gradients = {
        name: None if x is None else x[:, heads][:, :, places]
        for name, x in found.gradients.items()
    }
    found = replace(found, gradients=gradients)
    yield from check_values(backend, named, inputs, found=found, right=references[key])[1]


def _with_every_gradient(case: Case, inputs: Inputs, *, alike: bool) -> Inputs:
    """Draw gradients of the output at every row; where `alike`, with the same signs at all."""
    generator = torch.Generator(inputs.q.device).manual_seed(zlib.crc32(case.name.encode()))
    d_out = torch.randn(inputs.d_out.shape, generator=generator, device=inputs.q.device)
    if alike:
        # In float16 the sums must not overflow.
        group = case.geometry.heads // case.geometry.kv_heads
        size = min(1.0, _TERMS / (group * _tokens(case)))
        signs = torch.randn(d_out[:, :1].shape, generator=generator, device=d_out.device)
        d_out = torch.copysign(d_out, signs) * size
    return replace(inputs, d_out=d_out.to(inputs.d_out.dtype))


def _sampled(case: Case, *, first: int) -> tuple[list[int], list[Span]]:
    """Choose the key heads and the blocks of keys, from one on, whose gradients are compared."""
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
    blocks = [(max(first, n * _BLOCK), min((n + 1) * _BLOCK, n_tokens)) for n in starts]
    return heads.tolist(), blocks


def _tokens(case: Case) -> int:
    """Return the tokens of a row."""
    return sum(case.lengths) if case.packed else max(case.lengths)


def _expected(
    case: Case, inputs: Inputs, *, right: Expected, heads: list[int], blocks: list[Span]
) -> Expected:
    """Return the reference of the last call: dk and dv by blocks, the output of the first call."""
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
    found = expected(*results)
    return replace(
        found,
        rounding=found.rounding | {"out": right.rounding["out"]},
        gain=found.gain | {"out": right.gain["out"]},
    )


def _stacked(rows: list[Tensor | None]) -> Tensor:
    return torch.stack([row for row in rows if row is not None])

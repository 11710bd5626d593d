"""Check a backend under training conditions: no_grad, checkpointing, concurrent calls, dropout.

In training, all layers run forward before the first backward pass. Some calls record no gradients,
as with checkpointed activations and in evaluation, and in a partly frozen model some of q, k and v
need none. The tensors that a call saves may be discarded and computed again. A kernel that keeps
state between calls is correct only if no other call comes between.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnimg.facts import AttentionFunction, Backend, Geometry, Pattern
from attnimg.verify.blocks import Span, block_reference
from attnimg.verify.calls import ALL, Inputs, Result, backward, call, draw, forward, forward_only
from attnimg.verify.cases import Case
from attnimg.verify.checks import (
    Expected,
    Fault,
    check_finite,
    check_further_call,
    check_values,
    expected,
    fault,
)
from attnimg.verify.reference import reference

# Calls between the first forward and backward pass: as many as a typical model has layers.
_LAYERS = 32

# Gradients that are needed if an adapter is on some of the first layer's projections only.
_SUBSETS = [names for size in (1, 2) for names in itertools.combinations(("dq", "dk", "dv"), size)]

# Calls without gradients, and which of their arguments require one: the first pass of reentrant
# checkpointing, evaluation, generation, and layers below the first trained one.
_WITHOUT = {
    "without gradients": (torch.no_grad, ALL),
    "in evaluation": (torch.no_grad, ()),
    "in inference mode": (torch.inference_mode, ()),
    "below what learns": (nullcontext, ()),
}


def check_training_conditions(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Check calls without gradients, with some of them, and between the passes of another call.

    Args:
        function: the backend's attention function.
        backend: has the bounds that its results are compared with.
        case: the probe, short enough for all its rows to be compared.
        inputs: its tensors.
        right: the expected result.

    Raises:
        Exception: whatever the kernel raises.
    """
    before: torch.Tensor | None = None
    for what, (mode, learning) in _WITHOUT.items():
        with mode():
            found = forward_only(forward(function, backend, case, inputs, learning=learning))
        if before is not None and _address(found.out) == _address(before):
            text = f"{case.name}, {what}: the output is in the memory of the one before"
            yield fault("numerics-fwd", text, noise_sensitive=False)
        before = found.out
        yield from check_further_call(backend, case, inputs, what, found=found, right=right)
    found = call(_checkpointed(function), backend, case, inputs)
    yield from check_further_call(backend, case, inputs, "checkpointed", found=found, right=right)
    for learning in _SUBSETS:
        found = backward(forward(function, backend, case, inputs, learning=learning))
        what = f"gradients of {' and '.join(name[1:] for name in learning)} alone"
        yield from check_further_call(backend, case, inputs, what, found=found, right=right)
    yield from _interleaved(function, backend, case, inputs, right=right)


def _address(value: torch.Tensor) -> int:
    return int(value.untyped_storage().data_ptr())


def _checkpointed(function: AttentionFunction) -> AttentionFunction:
    """Return the function under checkpointing: its saved tensors are recomputed when needed."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return attend


def _interleaved(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Check two calls that run backward after many run forward; the second d_out is expanded."""
    second = replace(case, name=f"{case.name}, a second call")
    others = draw(second, device=str(inputs.q.device))
    others = replace(
        others, d_out=torch.ones_like(others.d_out[:1, :1, :1, :1]).expand(others.d_out.shape)
    )
    started = forward(function, backend, case, inputs)
    first_out = started.out.detach().clone()
    follows = forward(function, backend, second, others)
    if not torch.equal(started.out, first_out):
        text = f"{second.name} wrote into the output of the first"
        yield fault("numerics-fwd", text, noise_sensitive=False)
    held = [forward(function, backend, second, others) for _ in range(_LAYERS - 2)]
    found = backward(started)
    del held
    gradients = {name: g.clone() for name, g in found.gradients.items() if g is not None}
    after = backward(follows)
    for name, gradient in gradients.items():
        if not torch.equal(found.gradients[name], gradient):
            text = f"{second.name} wrote into {name} of the first"
            yield fault("numerics-bwd", text, noise_sensitive=False)
    what = "a second call before the backward pass"
    yield from check_further_call(backend, case, inputs, what, found=found, right=right)
    of_second = expected(
        *(
            reference(second, others, dtype=dtype, pattern=backend.pattern)
            for dtype in (torch.float64, inputs.q.dtype)
        )
    )
    yield from check_values(backend, second, others, found=after, right=of_second)[1]


# Packed rows are filled up to one of these lengths: three blocks of 128, and fifteen.
FILLED = (384, 1920)

# The most informative lengths of rows with one document: around tiles of 64 and blocks of 128.
EDGES = frozenset({1, 17, 64, 65, 127, 128, 129, 192, 257})

# Graphs that a proof may compile: about twice the number that 30 shapes and the combinations of
# gradients in check_training_conditions need.
RECOMPILE_LIMIT = 128


def is_compiled(backend: Backend, *, device: str) -> bool:
    """Return whether a backend's kernel is compiled in its first call with each shape."""
    return backend.mask == "flex" and device == "cuda"


def builds_plans(backend: Backend, *, device: str, capability: tuple[int, int] | None) -> bool:
    """Return whether a backend's calls go to cuDNN, which builds a plan for each shape.

    Args:
        backend: the backend.
        device: "cpu" or "cuda".
        capability: the GPU's compute capability; None for a CPU or an AMD GPU.
    """
    first = capability is not None and capability[0] in (9, 10)
    return backend.name == "sdpa" and device == "cuda" and first


def few_shapes(cases: list[Case]) -> list[Case]:
    """Return probes with few shapes: packed rows are filled up, other rows have EDGES only."""
    longest = max(max(case.lengths) for case in cases)
    kept = []
    for case in cases:
        plain = case.scores == "spread" and case.scale_factor == case.gradient_scale == 1.0
        heads, length = case.geometry.kv_heads, max(case.lengths)
        # The probes with all heads and the longest ones keep their lengths and layouts.
        special = heads > 2 or length == longest or (heads > 1 and length > max(EDGES))
        # The first probe has two groups of heads, and later ones have its lengths with one.
        fewer = case.geometry.heads < cases[0].geometry.heads
        one_length = len(set(case.lengths)) == 1 and not case.queries
        dropped = one_length and (fewer or length not in EDGES)
        if not case.packed and plain and dropped and not special:
            continue
        laid_out = case if special else replace(case, layout="fused")
        kept.append(_filled(laid_out) if case.packed else laid_out)
    return kept


def shapes_of(cases: list[Case]) -> set[tuple[int | str, ...]]:
    """Return the distinct shapes of calls: batch, heads, key heads, queries, keys and layout."""
    found: set[tuple[int | str, ...]] = set()
    for case in cases:
        rows, keys = (
            (1, sum(case.lengths)) if case.packed else (len(case.lengths), max(case.lengths))
        )
        heads = case.geometry.heads, case.geometry.kv_heads
        found.add((rows, *heads, case.queries or keys, keys, case.layout))
    return found


@contextmanager
def compiling_each_shape(backend: Backend, *, device: str) -> Iterator[None]:
    """Allow Dynamo as many graphs as a proof needs, and make it raise where it can't compile."""
    if not is_compiled(backend, device=device):
        yield
        return
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
        yield


def _filled(case: Case) -> Case:
    """Return a packed row filled up to the next of FILLED with one more document."""
    total = sum(case.lengths)
    length = next((length for length in FILLED if length >= total), total)
    # The probe of isolation is not filled up: its last document is one of those that change.
    if length == total or case.repeated:
        return case
    return replace(case, lengths=(*case.lengths, length - total))


# flash-attn compares 8 random bits with p, so that its rate is p rounded to 1/256.
# Source: flash-attn 2.8.3.post2, csrc/flash_attn/src/flash.h, p_dropout_in_uint8_t (2026-11-21).
COARSEST_RATE = 1 / 256

# Two masks are compared only if the probability that they are equal by chance is below this.
BY_CHANCE = 1e-9


def check_dropout(
    function: AttentionFunction, backend: Backend, geometry: Geometry, *, device: str, seed: int
) -> Iterator[Fault]:
    """Check a call with dropout against the reference with the same dropped weights.

    A kernel with the right rate is off by 5 standard deviations for one of 1.7 million seeds. It
    would be off again with the same seed, so each repetition of this probe has another one.
    """
    length = min(geometry.head_dim_v, 64)
    small = replace(geometry, softcap=None, sinks=False, window=None)
    case = Case(
        name=f"{length} tokens, dropout {geometry.dropout:g}",
        geometry=small,
        lengths=(length,),
        packed=geometry.packing,
        scale_factor=0.2,
    )
    inputs = draw(case, device=device)
    identity = torch.eye(length, geometry.head_dim_v, device=device, dtype=inputs.v.dtype)
    inputs = replace(inputs, q=inputs.q * 0.2, v=identity.expand_as(inputs.v).contiguous())
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        found = backward(forward(function, backend, case, inputs, dropout=geometry.dropout))
        again = forward_only(forward(function, backend, case, inputs, dropout=geometry.dropout))
    causal = torch.ones(length, length, device=device).tril().bool()
    kept_BHTS, kept_again = (
        (out.transpose(1, 2)[..., :length] != 0).double() for out in (found.out, again.out)
    )
    same = (geometry.dropout**2 + (1 - geometry.dropout) ** 2) ** (length * (length + 1) // 2)
    first, *others = kept_BHTS.unbind(1)
    if same < BY_CHANCE:
        whose = "two calls" if torch.equal(kept_BHTS, kept_again) else "two heads"
        if whose == "two calls" or any(torch.equal(first, other) for other in others):
            text = f"{case.name}: {whose} dropped the same weights"
            yield fault("dropout", text, noise_sensitive=True)
    rate = 1 - kept_BHTS[..., causal].mean().item()
    n_weights = kept_BHTS[..., causal].numel()
    spread = math.sqrt(geometry.dropout * (1 - geometry.dropout) / n_weights)
    if abs(rate - geometry.dropout) > 5 * spread + COARSEST_RATE:
        text = f"{case.name}: {rate:.1%} of the weights were dropped"
        yield fault("dropout", text, noise_sensitive=True)
        return
    keep = kept_BHTS / (1 - geometry.dropout)
    exact = reference(case, inputs, dtype=torch.float64, keep=keep)
    plain = reference(case, inputs, dtype=inputs.q.dtype, keep=keep.to(inputs.q.dtype))
    right = expected(exact, plain)
    yield from check_values(backend, case, inputs, found=found, right=right)[1]


# Tokens per block of keys, and the number of random blocks besides the first and the last one.
_BLOCK, _DRAWN = 32, 4

# Scores that the reference computes for the sampled key heads. On a GPU whose float64 is 64 times
# slower than its float32, 1 << 32 scores take one or two seconds.
_SCORES = {"cpu": 1 << 21, "cuda": 1 << 32}

# Number of terms of about 1 whose sum does not overflow float16, with a margin for larger terms.
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
    """Check two more calls of a whole row: without gradients, and with gradients at every row.

    Args:
        function: the backend's attention function.
        backend: the backend whose bounds are used.
        case: the probe; its also_learning names the gradients of the second call.
        inputs: its tensors.
        right: the expected result of the probe's own call.
        references: cache of the expected results of second calls; a missing one is added.

    Raises:
        Exception: whatever the kernel raises.
    """
    with torch.no_grad():
        found = forward_only(forward(function, backend, case, inputs))
    yield from check_further_call(
        backend, case, inputs, "without gradients", found=found, right=right
    )
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
    """Return inputs with a random d_out at every row; with `alike`, its signs are equal at all."""
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
    """Choose the key heads, and the blocks of keys from `first` on, to compare gradients of."""
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
    """Return the number of tokens in a row."""
    return sum(case.lengths) if case.packed else max(case.lengths)


def _expected(
    case: Case, inputs: Inputs, *, right: Expected, heads: list[int], blocks: list[Span]
) -> Expected:
    """Return the expected result of the second call: the same output, and dk and dv of blocks."""
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

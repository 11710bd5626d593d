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

from attnimg.facts import AttentionFunction, Backend, Pattern
from attnimg.run_facts import Geometry
from attnimg.verification.blocks import Span, block_reference
from attnimg.verification.calls import (
    ALL,
    Inputs,
    Probe,
    Result,
    backward,
    call,
    draw_inputs,
    each_row,
    forward,
    forward_only,
)
from attnimg.verification.cases import Case
from attnimg.verification.checks import (
    Expected,
    Fault,
    build_expected,
    check_finite,
    check_further_call,
    check_precision,
    check_values,
)
from attnimg.verification.reference import reference

# Calls between the first forward and backward pass: as many as a typical model has layers.
_LAYERS = 32

# Gradients that are needed if an adapter is on some of the first layer's projections only.
_SUBSETS = [names for size in (1, 2) for names in itertools.combinations(("dq", "dk", "dv"), size)]

# Calls without gradients, and which of their arguments require one: the first pass of reentrant
# checkpointing, evaluation, generation, and layers below the first trained one.
_WITHOUT_GRADIENTS = {
    "without gradients": (torch.no_grad, ALL),
    "in evaluation": (torch.no_grad, ()),
    "in inference mode": (torch.inference_mode, ()),
    "below the first trained layer": (nullcontext, ()),
}


def check_training_conditions(probe: Probe, expected: Expected) -> Iterator[Fault]:
    """Check calls without gradients, with some of them, and between the passes of another call.

    Args:
        probe: one that is short enough for all its rows to be compared.
        expected: its expected result.

    Raises:
        Exception: whatever the kernel raises.
    """
    before: Tensor | None = None
    for what, (mode, needs_grad) in _WITHOUT_GRADIENTS.items():
        with mode():
            found = forward_only(forward(probe, needs_grad=needs_grad))
        if before is not None and _address(found.out) == _address(before):
            text = f"{probe.case.name}, {what}: the output is in the memory of the one before"
            yield Fault("numerics-fwd", text, noise_sensitive=False)
        before = found.out
        yield from check_further_call(probe, what, found, expected)
    found = call(probe._replace(function=_with_checkpointing(probe.function)))
    yield from check_further_call(probe, "checkpointed", found, expected)
    for needs_grad in _SUBSETS:
        yield from check_gradients_of(probe, expected, needs_grad)
    yield from _check_interleaved_calls(probe, expected)


def check_gradients_of(
    probe: Probe, expected: Expected, needs_grad: tuple[str, ...]
) -> Iterator[Fault]:
    """Check a call of which only some gradients are requested."""
    found = backward(forward(probe, needs_grad=needs_grad))
    what = f"gradients of {' and '.join(name[1:] for name in needs_grad)} alone"
    yield from check_further_call(probe, what, found, expected)


def check_without_gradients(
    probe: Probe, expected: Expected, *, what: str = "without gradients"
) -> Iterator[Fault]:
    """Check a call of _WITHOUT_GRADIENTS, by default the one that evaluation makes."""
    mode, needs_grad = _WITHOUT_GRADIENTS[what]
    with mode():
        found = forward_only(forward(probe, needs_grad=needs_grad))
    yield from check_further_call(probe, what, found, expected)


def _address(value: Tensor) -> int:
    return int(value.untyped_storage().data_ptr())


def _with_checkpointing(function: AttentionFunction) -> AttentionFunction:
    """Return the function under checkpointing: its saved tensors are recomputed when needed."""

    def attend(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return attend


def _check_interleaved_calls(probe: Probe, expected: Expected) -> Iterator[Fault]:
    """Check two calls that run backward after many run forward; the second d_out is expanded."""
    case = replace(probe.case, name=f"{probe.case.name}, a second call")
    inputs = draw_inputs(case, device=str(probe.inputs.q.device))
    d_out = torch.ones_like(inputs.d_out[:1, :1, :1, :1]).expand(inputs.d_out.shape)
    second = probe._replace(case=case, inputs=replace(inputs, d_out=d_out))
    first_pass = forward(probe)
    first_out = first_pass.out.detach().clone()
    second_pass = forward(second)
    if not torch.equal(first_pass.out, first_out):
        text = f"{case.name} wrote into the output of the first"
        yield Fault("numerics-fwd", text, noise_sensitive=False)
    other_layers = [forward(second) for _ in range(_LAYERS - 2)]
    found = backward(first_pass)
    del other_layers
    gradients = {name: g.clone() for name, g in found.gradients.items() if g is not None}
    found_second = backward(second_pass)
    for name, gradient in gradients.items():
        if not torch.equal(found.gradients[name], gradient):
            text = f"{case.name} wrote into {name} of the first"
            yield Fault("numerics-bwd", text, noise_sensitive=False)
    what = "a second call before the backward pass"
    yield from check_further_call(probe, what, found, expected)
    results = (
        reference(case, second.inputs, dtype=dtype, pattern=probe.backend.pattern)
        for dtype in (torch.float64, inputs.q.dtype)
    )
    yield from check_values(second, found_second, build_expected(*results))[1]


# Graphs that a proof may compile: about twice the number that 30 shapes and the combinations of
# gradients in check_training_conditions need.
RECOMPILE_LIMIT = 128


def is_compiled(backend: Backend, *, device: str) -> bool:
    """Return whether a backend's kernel is compiled in its first call with each shape."""
    return backend.mask == "flex" and device == "cuda"


def builds_cudnn_plans(
    backend: Backend, *, device: str, capability: tuple[int, int] | None
) -> bool:
    """Return whether a backend's calls go to cuDNN, which builds a plan for each shape.

    Args:
        backend: the backend.
        device: "cpu" or "cuda".
        capability: the GPU's compute capability; None for a CPU or an AMD GPU.
    """
    first = capability is not None and capability[0] in (9, 10)
    return backend.name == "sdpa" and device == "cuda" and first


@contextmanager
def compiling_each_shape(backend: Backend, *, device: str) -> Iterator[None]:
    """Allow Dynamo as many graphs as a proof needs, and make it raise where it can't compile."""
    if not is_compiled(backend, device=device):
        yield
        return
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
        yield


# flash-attn compares 8 random bits with p, so that its rate is p rounded to 1/256.
# Source: flash-attn 2.8.3.post2, csrc/flash_attn/src/flash.h, p_dropout_in_uint8_t (2026-11-21).
COARSEST_RATE = 1 / 256

# Two masks are compared only if the probability that they are equal by chance is below this. The
# same for the weights of one query or key that are all dropped.
MAX_CHANCE = 1e-9


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
    inputs = draw_inputs(case, device=device)
    identity = torch.eye(length, geometry.head_dim_v, device=device, dtype=inputs.v.dtype)
    inputs = replace(inputs, q=inputs.q * 0.2, v=identity.expand_as(inputs.v).contiguous())
    probe = Probe(function, backend, case, inputs)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        found = backward(forward(probe, dropout=geometry.dropout))
        again = forward_only(forward(probe, dropout=geometry.dropout))
    causal = torch.ones(length, length, device=device).tril().bool()
    kept_BHTS, kept_again = (
        (out.transpose(1, 2)[..., :length] != 0).double() for out in (found.out, again.out)
    )
    same = (geometry.dropout**2 + (1 - geometry.dropout) ** 2) ** (length * (length + 1) // 2)
    first, *others = kept_BHTS.unbind(1)
    if same < MAX_CHANCE:
        whose = "two calls" if torch.equal(kept_BHTS, kept_again) else "two heads"
        if whose == "two calls" or any(torch.equal(first, other) for other in others):
            text = f"{case.name}: {whose} dropped the same weights"
            yield Fault("dropout", text, noise_sensitive=True)
    rate = 1 - kept_BHTS[..., causal].mean().item()
    n_weights = kept_BHTS[..., causal].numel()
    spread = math.sqrt(geometry.dropout * (1 - geometry.dropout) / n_weights)
    if abs(rate - geometry.dropout) > 5 * spread + COARSEST_RATE:
        text = f"{case.name}: {rate:.1%} of the weights were dropped"
        yield Fault("dropout", text, noise_sensitive=True)
        return
    for what, dim in (("query", -1), ("key", -2)):
        if _are_dropped_together(kept_BHTS, causal, dim=dim, rate=geometry.dropout):
            text = f"{case.name}: the weights of a {what} were dropped together"
            yield Fault("dropout", text, noise_sensitive=False)
            return
    keep = kept_BHTS / (1 - geometry.dropout)
    exact = reference(case, inputs, dtype=torch.float64, keep=keep)
    plain = reference(case, inputs, dtype=inputs.q.dtype, keep=keep.to(inputs.q.dtype))
    yield from check_values(probe, found, build_expected(exact, plain))[1]


def _are_dropped_together(kept: Tensor, seen: Tensor, *, dim: int, rate: float) -> bool:
    """Return whether more weights of a query, or of a key, were dropped than chance explains.

    Of n weights, at least n * share are dropped with a probability of at most exp(-n * KL), where
    KL is the divergence of share from the rate (Chernoff's bound, which is exact for all n).
    """
    n = seen.sum(dim).double()
    share = ((1 - kept) * seen).sum(dim) / n
    highest = torch.tensor(min(rate + COARSEST_RATE, 1.0), dtype=torch.float64, device=n.device)
    share = torch.maximum(share.double(), highest)
    divergence = torch.xlogy(share, share / highest)
    divergence += torch.xlogy(1 - share, (1 - share) / (1 - highest))
    return bool((n * divergence).max() > -math.log(MAX_CHANCE / share.numel()))


# Tokens per block of keys, and the number of random blocks besides the first and the last one.
_BLOCK, _RANDOM_BLOCKS = 32, 4

# Scores that the reference computes for the sampled key heads. On a GPU whose float64 is 64 times
# slower than its float32, 1 << 32 scores take one or two seconds.
_MAX_SCORES = {"cpu": 1 << 21, "cuda": 1 << 32}

# Number of terms of about 1 whose sum does not overflow float16, with a margin for larger terms.
_MAX_TERMS = 4096


def check_full_row(
    probe: Probe, expected: Expected, references: dict[tuple[Pattern, Case], Expected]
) -> Iterator[Fault]:
    """Check further calls of a full row: without gradients, and with gradients at every row.

    Args:
        probe: its case's extra_gradients names the gradients of the second call.
        expected: the expected result of the probe's own call.
        references: cache of the expected results of second calls; a missing one is added.

    Raises:
        Exception: whatever the kernel raises.
    """
    yield from check_without_gradients(probe, expected)
    case, pattern = probe.case, probe.backend.pattern
    same_sign = max(case.lengths) == _tokens(case)
    if same_sign:
        yield from check_without_gradients(probe, expected, what="in inference mode")
    if pattern != "full":
        return
    what = " and ".join(name[1:] for name in case.extra_gradients)
    named = replace(case, name=f"{case.name}, gradients of {what} alone")
    inputs = _with_every_gradient(case, probe.inputs, same_sign=same_sign)
    found = backward(forward(probe._replace(inputs=inputs), needs_grad=case.extra_gradients))
    yield from check_finite(named, found)
    heads, blocks = _sample(case, first=1 if same_sign else 0)
    places = torch.cat([torch.arange(*block) for block in blocks]).to(inputs.q.device)
    if (pattern, named) not in references:
        second = _expect_blocks(case, inputs, expected, heads=heads, blocks=blocks)
        references[pattern, named] = replace(second, same_sign=same_sign, sample=(heads, places))
    gradients = {
        name: None if x is None else x[:, heads][:, :, places]
        for name, x in found.gradients.items()
    }
    found = replace(found, gradients=gradients)
    second_call = probe._replace(case=named, inputs=inputs)
    yield from check_values(second_call, found, references[pattern, named])[1]
    yield from check_precision(second_call, found, references[pattern, named])


def _with_every_gradient(case: Case, inputs: Inputs, *, same_sign: bool) -> Inputs:
    """Return inputs with a random d_out at every row; `same_sign`: all signs are equal."""
    generator = torch.Generator(inputs.q.device).manual_seed(zlib.crc32(case.name.encode()))
    d_out = torch.randn(inputs.d_out.shape, generator=generator, device=inputs.q.device)
    if same_sign:
        # In float16 the sums must not overflow.
        group = case.geometry.heads // case.geometry.kv_heads
        size = min(1.0, _MAX_TERMS / (group * _tokens(case)))
        signs = torch.randn(d_out[:, :1].shape, generator=generator, device=d_out.device)
        d_out = torch.copysign(d_out, signs) * size
    return replace(inputs, d_out=d_out.to(inputs.d_out.dtype))


def _sample(case: Case, *, first: int) -> tuple[list[int], list[Span]]:
    """Choose the key heads, and the blocks of keys from `first` on, to compare gradients of."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case.name}, blocks".encode()))
    geometry, n_tokens = case.geometry, _tokens(case)
    group = geometry.heads // geometry.kv_heads
    squares = sum(n * n for n in case.lengths)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n_heads = min(geometry.kv_heads, max(1, _MAX_SCORES[device] // (group * squares)))
    heads = torch.randperm(geometry.kv_heads, generator=generator)[:n_heads].sort().values
    n_blocks = -(-n_tokens // _BLOCK)
    drawn = torch.randperm(n_blocks, generator=generator)[:_RANDOM_BLOCKS].tolist()
    starts = sorted({0, n_blocks - 1, *drawn})
    blocks = [(max(first, n * _BLOCK), min((n + 1) * _BLOCK, n_tokens)) for n in starts]
    return heads.tolist(), blocks


def _tokens(case: Case) -> int:
    """Return the number of tokens in a row."""
    return sum(case.lengths) if case.packed else max(case.lengths)


def _expect_blocks(
    case: Case, inputs: Inputs, first: Expected, *, heads: list[int], blocks: list[Span]
) -> Expected:
    """Return the expected result of the second call: the same output, and dk and dv of blocks."""
    group = case.geometry.heads // case.geometry.kv_heads
    of_group = [head * group + place for head in heads for place in range(group)]
    of_heads = [
        replace(
            row,
            q=row.q[of_group],
            k=row.k[heads],
            v=row.v[heads],
            d_out=None if row.d_out is None else row.d_out[of_group],
            sinks=None if row.sinks is None else row.sinks[of_group],
        )
        for row in each_row(case, inputs)
    ]
    results = []
    for dtype, rounded_to in ((torch.float64, None), (torch.float32, inputs.q.dtype)):
        rows = [replace(row, dtype=dtype, rounded_to=rounded_to) for row in of_heads]
        found = [block_reference(row, queries=(), keys=blocks) for row in rows]
        gradients: dict[str, Tensor | None] = {
            name: torch.stack([getattr(row, name) for row in found]) for name in ("dk", "dv")
        }
        results.append(Result(out=first.exact.out, gradients=gradients))
    expected = build_expected(*results)
    return replace(
        expected,
        rounding=expected.rounding | {"out": first.rounding["out"]},
        gain=expected.gain | {"out": first.gain["out"]},
        mean_rounding=expected.mean_rounding | {"out": first.mean_rounding["out"]},
    )

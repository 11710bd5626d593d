"""Judge a call by others: made again, or with some of its documents changed.

Outputs are compared bit by bit. No kernel known here adds an output up in an order that depends on
arrival: each row block is one thread block's, over its key blocks from one end to the other; where
those are split, the parts are combined in their order, and their number follows from shapes
(FA2 csrc/flash_attn/flash_api.cpp, num_splits_heuristic; FA3 hopper/heuristics.h; the dynamic
schedulers of FA3 and FA4 choose who computes a block, not how). FA4 leaves out a rescaling where a
row's maximum grew little, each row by itself. What a mask hides adds exact zeros. Read 2026-11-26.

Gradients are compared bit by bit where the kernel repeats them bit by bit. Where it does not, they
are compared by what noise.py derives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnimg.facts import Reason
from attnimg.verify.cases import Case
from attnimg.verify.checks import Fault, largest
from attnimg.verify.noise import beyond_a_flip
from attnimg.verify.one_call import Result

# A kernel may be noisier than float32 sums are, such as one with sums in bfloat16: how far repeats
# of one call are apart, as a multiple of the bound, holds for other calls up to this factor.
BEYOND_SEEN = 2.0


def check_repeated(
    case: Case, *, first: Result, second: Result, gradients_too: bool
) -> Iterator[Fault]:
    """Compare two calls with the same inputs, bit by bit."""
    if not torch.equal(first.out, second.out):
        text = f"{case.name}: the same inputs gave outputs {_apart(first.out, second.out)} apart"
        yield _fault("nondeterministic", text)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        if not gradients_too or gradient is None or other is None:
            continue
        if not torch.equal(gradient, other):
            text = f"{case.name}: the same inputs gave {name} {_apart(gradient, other)} apart"
            yield _fault("nondeterministic", text)


def check_isolated(
    case: Case,
    *,
    before: Sequence[Result],
    after: Sequence[Result],
    kept: Tensor,
    noise: dict[str, Tensor],
) -> Iterator[Fault]:
    """Require that tokens of other documents kept their outputs and gradients.

    Args:
        case: the probe.
        before: the results of one call made at least twice, before some documents' q, k and v were
            changed.
        after: the results of one call made after that, one or more.
        kept: the tokens of the other documents, bool, (B, T).
        noise: noise.sum_noise of the call before.
    """
    if not torch.equal(before[0].out[kept], after[0].out[kept]):
        shift = _apart(before[0].out[kept], after[0].out[kept])
        text = f"{case.name}: changing one document moved the output of others by {shift}"
        yield _fault("packing-not-isolated", text)
    for name, bound_BTHD in noise.items():
        one, *same = _kept(before, name, kept)
        other, *same_after = _kept(after, name, kept)
        if one is None or other is None or torch.equal(one, other):
            continue
        again = [(one, x) for x in same] + [(other, x) for x in same_after]
        repeats = all(x is not None and torch.equal(x, reference) for reference, x in again)
        bound = bound_BTHD[kept].double()
        seen = max(_multiple(reference, x, bound) for reference, x in again if x is not None)
        allowed = max(1.0, BEYOND_SEEN * seen)
        # `not <=` also holds for NaN.
        if repeats or not _multiple(one, other, bound) <= allowed:
            moved, by_itself = _apart(one, other), "does not move"
            if not repeats:
                excess = largest(beyond_a_flip(one, other))
                by_itself = (
                    f"moves by one rounding and a float32 sum's order, not {excess:.1e} more"
                )
            text = (
                f"{case.name}: changing one document moved {name} of others by {moved}"
                f" (by itself it {by_itself})"
            )
            yield _fault("packing-not-isolated", text)


def _kept(results: Sequence[Result], name: str, kept: Tensor) -> list[Tensor | None]:
    """Return a gradient at the kept tokens, (tokens, heads, D), for each result."""
    found = (result.gradients[name] for result in results)
    return [None if x is None else x.transpose(1, 2)[kept] for x in found]


def _multiple(one: Tensor, other: Tensor, bound: Tensor) -> float:
    """Return by how many times the bound two gradients differ at worst, one flip left out."""
    if torch.equal(one, other):
        return 0.0
    excess = beyond_a_flip(one, other)
    # 0 / 0 where nothing may move and nothing does; NaN of a gradient stays.
    return largest(torch.where(excess == 0, 0.0, excess / bound))


def _apart(one: Tensor, other: Tensor) -> str:
    return f"{largest(one.double() - other.double()):.1e}"


def _fault(code: str, text: str) -> Fault:
    return Fault(reason=Reason(code=code, text=text), noise_sensitive=True)

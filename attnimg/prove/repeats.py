"""Judge a call by another: made again, or with some of its documents changed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnimg.facts import Reason
from attnimg.prove.calls import Result
from attnimg.prove.cases import Case
from attnimg.prove.checks import largest
from attnimg.prove.inputs import Inputs


def check_repeated(
    case: Case, *, first: Result, second: Result, gradients_too: bool
) -> Iterator[Reason]:
    """Compare two calls with the same inputs, bit by bit."""
    if not torch.equal(first.out, second.out):
        text = f"{case.name}: the same inputs gave outputs {_apart(first.out, second.out)} apart"
        yield Reason(code="nondeterministic", text=text)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        if not gradients_too or gradient is None or other is None:
            continue
        if not torch.equal(gradient, other):
            text = f"{case.name}: the same inputs gave {name} {_apart(gradient, other)} apart"
            yield Reason(code="nondeterministic", text=text)


def check_isolated(
    case: Case,
    inputs: Inputs,
    *,
    before: Result,
    again: Result,
    after: Result,
    changed: Tensor,
) -> Iterator[Reason]:
    """Require that tokens of other documents kept their outputs and gradients.

    Args:
        case: the probe.
        inputs: its tensors.
        before: the result before some documents' q, k and v were changed.
        again: the same call made again: how far gradients move by themselves.
        after: the result after.
        changed: the tokens of the changed documents, bool, (B, T).
    """
    kept = ~changed & (inputs.documents >= 0)
    if not torch.equal(before.out[kept], after.out[kept]):
        shift = _apart(before.out[kept], after.out[kept])
        text = f"{case.name}: changing one document moved the output of others by {shift}"
        yield Reason(code="packing-not-isolated", text=text)
    for name in ("dq", "dk", "dv"):
        values = [result.gradients[name] for result in (before, again, after)]
        if any(value is None for value in values):
            continue
        one, same, other = (value.transpose(1, 2)[kept] for value in values if value is not None)
        spread, moved = largest(one - same), largest(one - other)
        # `not <=` also holds for NaN.
        if not moved <= spread:
            text = (
                f"{case.name}: changing one document moved {name} of others by {moved:.1e}"
                f" (by itself it moves {spread:.1e})"
            )
            yield Reason(code="packing-not-isolated", text=text)


def _apart(one: Tensor, other: Tensor) -> str:
    return f"{largest(one.double() - other.double()):.1e}"

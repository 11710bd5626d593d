"""Judge one probe: the rules that a call of a backend must keep.

Every rule that is broken is told, each as a Reason with a code of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnimg.facts import Backend, Figure, Reason
from attnimg.prove.calls import Result
from attnimg.prove.cases import Case
from attnimg.prove.inputs import Inputs

# Allowed besides a multiple of plain attention's own error, as a share of the largest value: a few
# units in the last place, for where plain attention happens to be exact. In float32 more, since
# torch 2.13's CPU kernel has an exp() of its own and is 7e-6 off in dk (seen 2026-11-21).
ATOL = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}
# And for gradients where scores are about 120: a flash kernel's backward goes by the log-sum-exp in
# float32, which has 8e-6 between neighbours there. torch 2.13's CPU kernel is 4e-4 off in dq
# (seen 2026-11-21), plain attention 4e-5.
ATOL_SHIFTED = 1e-3
# Told first, as what lies at the root of the others.
ORDER = (
    "import-error",
    "crash",
    "timeout",
    "oom",
    "nan",
    "zeros",
    "packing-not-isolated",
    "dropout",
    "numerics-fwd",
    "grad-detached",
    "numerics-bwd",
    "nondeterministic",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """What a case should give: the oracle's result, and how far plain attention is from it.

    Attributes:
        exact: in float64.
        rounding: largest error of plain attention in the run's precision, for each quantity.
    """

    exact: Result
    rounding: dict[str, float]


def expected(exact: Result, plain: Result) -> Expected:
    """Measure plain attention in the run's precision against the oracle."""
    rounding = {"out": _largest(plain.out.double() - exact.out)}
    for name, gradient in exact.gradients.items():
        found = plain.gradients[name]
        assert found is not None
        assert gradient is not None
        rounding[name] = _largest(found.double() - gradient)
    return Expected(exact=exact, rounding=rounding)


def check_values(
    backend: Backend, case: Case, inputs: Inputs, *, found: Result, right: Expected
) -> tuple[list[Figure], list[Reason]]:
    """Compare a result with what is expected.

    Returns:
        A figure for each quantity that could be compared, and every rule that was broken.
    """
    figures: list[Figure] = []
    reasons: list[Reason] = []
    if found.out.shape != inputs.d_out.shape:
        text = f"{case.name}: output {tuple(found.out.shape)}, needed {tuple(inputs.d_out.shape)}"
        return figures, [Reason(code="numerics-fwd", text=text)]
    out = found.out[:, inputs.rows]
    is_token = inputs.documents[:, -found.out.shape[1] :] >= 0
    reasons += _is_sound(case, "out", found.out[is_token])
    if not reasons:
        exact = right.exact.out
        out = out * is_token[:, inputs.rows, None, None]
        figure = _compare(backend, case, inputs, name="out", pair=(out, exact), right=right)
        figures.append(figure)
        reasons += _out_of_bounds(backend, figure, code="numerics-fwd")
    for name, gradient in found.gradients.items():
        if gradient is None or not found.attached:
            text = f"{case.name}: no gradient reaches {name[1:]}"
            reasons.append(Reason(code="grad-detached", text=text))
            continue
        exact_gradient = right.exact.gradients[name]
        assert exact_gradient is not None
        unsound = list(_is_sound(case, name, gradient, empty_ok=not exact_gradient.any()))
        reasons += unsound
        if not unsound:
            pair = (gradient, exact_gradient)
            figure = _compare(backend, case, inputs, name=name, pair=pair, right=right)
            figures.append(figure)
            reasons += _out_of_bounds(backend, figure, code="numerics-bwd")
    return figures, reasons


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
        spread, moved = _largest(one - same), _largest(one - other)
        # `not <=` also holds for NaN.
        if not moved <= spread:
            text = (
                f"{case.name}: changing one document moved {name} of others by {moved:.1e}"
                f" (by itself it moves {spread:.1e})"
            )
            yield Reason(code="packing-not-isolated", text=text)


def _is_sound(case: Case, name: str, value: Tensor, *, empty_ok: bool = False) -> Iterator[Reason]:
    """Require finite values that are not all zero."""
    if not torch.isfinite(value).all():
        share = (~torch.isfinite(value)).double().mean().item()
        text = f"{case.name}: {share:.0%} of {name} is NaN or infinite"
        yield Reason(code="nan", text=text)
    elif not value.any() and not empty_ok:
        if name == "out":
            yield Reason(code="zeros", text=f"{case.name}: the whole output is 0")
        else:
            text = f"{case.name}: {name} is 0 everywhere: {name[1:]} would never learn"
            yield Reason(code="grad-detached", text=text)


def _compare(
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    name: str,
    pair: tuple[Tensor, Tensor],
    right: Expected,
) -> Figure:
    """Give the error of one quantity, found and exact, and what is allowed."""
    found, exact = pair
    difference = found.double() - exact
    factor = backend.k_forward if name == "out" else backend.k_backward
    if factor is None:
        signal, noise = exact.square().sum().item(), difference.square().sum().item()
        decibels = 10 * math.log10(signal / noise) if signal and noise else math.inf
        # Quantized scores around -110 keep no digit of what the softmax sees.
        judged = backend.sqnr_db is not None and case.scores == "spread"
        allowed = backend.sqnr_db if judged and backend.sqnr_db is not None else -math.inf
        return Figure(quantity=name, error=-decibels, allowed=-allowed, case=case.name)
    size = _largest(exact)
    if not size:
        # dq and dk of a lone token: what is left when two equal terms of this size are subtracted.
        size = _largest(inputs.d_out) * _largest(inputs.v) * inputs.v.shape[-1]
        size *= inputs.scale * max(_largest(inputs.q), _largest(inputs.k))
    atol = ATOL[case.geometry.dtype]
    if name != "out" and case.scores in ("negative", "large"):
        atol += ATOL_SHIFTED
    return Figure(
        quantity=name,
        error=_largest(difference),
        allowed=factor * right.rounding[name] + atol * size,
        case=case.name,
    )


def _out_of_bounds(backend: Backend, figure: Figure, *, code: str) -> Iterator[Reason]:
    if figure.error <= figure.allowed:
        return
    factor = backend.k_forward if figure.quantity == "out" else backend.k_backward
    rule = f"{factor:g} times plain attention's" if factor else "of the signal, in decibels"
    text = (
        f"{figure.case}: {figure.quantity} is {figure.error:.1e} off the reference,"
        f" allowed {figure.allowed:.1e} ({rule})"
    )
    yield Reason(code=code, text=text)


def _apart(one: Tensor, other: Tensor) -> str:
    return f"{_largest(one.double() - other.double()):.1e}"


def _largest(value: Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0

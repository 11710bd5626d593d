"""Check the results of one probe against the rules that each call of a backend must satisfy.

Each broken rule is a Fault, whose reason has a code of its own. Rounding or random numbers may make
a correct kernel break a rule in one call: such a fault is marked as noise_sensitive, and
candidate.py counts it only if it occurs again.

These are compared bit by bit, and a correct kernel on a GPU passes: the inputs with a copy of them,
since they hold no NaN and autograd forbids changing them; in training_conditions.py a result with a
copy of the same memory; the outputs of equal calls, see check_repeated. All else has a tolerance:
gradients may change by reference.sum_order_bounds, random number generators may advance
(process_state.py), a dropout rate may be off by 5 standard deviations and the step of the coarsest
kernel. The bounds here allow for P and dS rounded before they are multiplied, for exp2 in place of
exp and for rescaling block by block: the errors of kernels that do all of that are up to half of
the bounds (tests/fixtures/noisy_kernels, docs/measured/proof-noise.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from attnimg.facts import Backend, DType
from attnimg.run_facts import Figure, Reason
from attnimg.verification.calls import Probe, Result, each_row
from attnimg.verification.cases import Case, Scores
from attnimg.verification.reference import difference_beyond_ulp
from attnimg.verification.rounding import rounding_bounds

# Allowed in addition to a multiple of plain attention's own error, as a share of the largest value:
# a few units in the last place, for cases where plain attention is exact by chance. More in
# float32, since torch 2.13's CPU kernel has its own exp() and is 7e-6 off in dk (seen 2026-11-21).
ATOL = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}

# The same for gradients where scores are in the hundreds: a flash kernel's backward pass uses the
# log-sum-exp in float32, whose spacing is 8e-6 to 3e-5 there. torch 2.13's CPU kernel is 4e-4 off
# in dq (seen 2026-11-21), plain attention 4e-5. At scores of -900 the spacing is 6e-5, and the
# vectors of k are long: torch's kernel is 9e-3 off where the scale is not a power of 2, such as
# with head_dim 32 (seen 2026-11-27).
ATOL_SHIFTED = {"negative": 1e-3, "large": 1e-3, "hundreds": 1e-3, "below-hundreds": 2e-2}

# flash-attn's own bound for the gradients of its CK kernels, on AMD's GPUs.
# Source: flash-attention 2.8.3.post2, tests/test_flash_attn_ck.py (2026-11-21).
K_BACKWARD_CK = 10.0

# How far the least-squares factor between a quantity and its reference may be from 1, in addition
# to a multiple of plain attention's: rounding averages out in it, a wrong factor does not. Our
# choice (2026-11-25); torch 2.13's CPU kernels stay below a sixth of it, plain attention below
# half.
GAIN = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1e-2}

# The same for dv where the terms of its sums have the same sign. Kernels that add them up in
# float32 are up to 0.0011 off in bfloat16; sums in bfloat16 are 0.008 to 0.012 off where they are
# rounded after every 16 of 512 to 829 rows, and 0.002 to 0.006 after every 32. Not used for dk: a
# correct kernel was 0.005 off (torch 2.13's on a CPU, head_dim 128). Our choice (2026-11-27).
GAIN_SAME_SIGN = GAIN | {"bfloat16": 5e-3}

# Where queries see at most this many keys, plain attention's own error comes from too few values to
# be a measure; see rounding.py. With one key it is 0 in dq and dk, whose terms cancel exactly. With
# 3 tokens in float16, a correct kernel was 1.1 times the bound from it, and with a window of 1 and
# sinks in bfloat16 24 times (benchmarks/proof_noise.py, 2026-11-27).
SHORT = 16

# The same as GAIN for the scale of the scores, which a kernel may round to the run's precision; it
# hardly changes the gain of the output. Our choice (2026-11-27).
SCALE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 7e-3}

# How many times plain attention's root mean square error a quantity of a long row may have in half
# precision. Plain attention rounds its scores and is the least exact of the right kernels: fused
# ones have 0.1 to 0.6 of its error, eager attention 0.74 to 1.10 (160 results of 512 to 832
# tokens). Sums in bfloat16 that are rounded after every 32 rows of dv or 8 of dk have 1.3 to 1.7 at
# 832 tokens, and the more the longer the row (2026-11-27).
MEAN_ROUNDING = 1.25

# The fewest tokens of such a row.
MEAN_TOKENS = 512

# The fewest values for which GAIN is checked: over fewer, rounding does not average out.
GAIN_VALUES = 4096

# Errors up to this many times the allowed error may be noise: they count only if they occur again.
NOISE_MARGIN = 2.0

# Each head has one value of dsinks, a sum over all queries that may cancel: plain attention's own
# error in it comes from few values, and correct kernels had up to 4 times the bound from it. The
# root of the sum of the terms' squared errors is the standard deviation of this error; this many of
# them count as plain attention's error. transformers' eager attention, and kernels that round P or
# out before they are used, stay below 0.45 of the bound (1620 probes, 2026-11-27).
SINK_DEVIATIONS = 2.0

# Codes of reasons in the order in which they are reported: likely causes of others come first.
CODE_ORDER = (
    "import-error",
    "process-state",
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
    """The expected result of a case: in float64, and how far plain attention is from that.

    Attributes:
        exact: the result in float64.
        rounding: largest error of plain attention in the run's precision, for each quantity; for
            dsinks, an estimate of it.
        gain: for each quantity, how far plain attention's least-squares factor is from 1.
        slope: d(output) / d(log scale); None where the scale is not checked.
        scale: relative error of the scale that fits plain attention's output best.
        same_sign: whether the terms of dv have the same sign; see check_full_row.
        mean_rounding: root mean square of plain attention's error, for each quantity.
        sample: the key heads and the tokens whose dk and dv are compared; None for all.
    """

    exact: Result
    rounding: dict[str, float]
    gain: dict[str, float]
    slope: Tensor | None = None
    scale: float = 0.0
    same_sign: bool = False
    mean_rounding: dict[str, float] = field(default_factory=dict)
    sample: tuple[list[int], Tensor] | None = None

    def of(self, name: str) -> Tensor:
        """Return the exact output for "out", else the exact gradient."""
        value = self.exact.out if name == "out" else self.exact.gradients[name]
        assert value is not None
        return value


class Fault(NamedTuple):
    """A rule that a call broke.

    Attributes:
        code: the reason's code.
        text: the reason's text, for the user.
        noise_sensitive: whether rounding or random numbers may make a correct kernel break the
            rule in one call, but hardly in two.
    """

    code: str
    text: str
    noise_sensitive: bool

    @property
    def reason(self) -> Reason:
        """Return the reason to refuse the backend."""
        return Reason(code=self.code, text=self.text)


def build_expected(exact: Result, plain: Result, *, slope: Tensor | None = None) -> Expected:
    """Return the expected result, with plain attention's errors; see Expected for the slope."""
    rounding = {"out": largest(plain.out.double() - exact.out)}
    gain = {"out": abs(fit_factor(plain.out, exact.out) - 1)}
    mean_rounding = {"out": root_mean_square(plain.out.double() - exact.out)}
    for name, gradient in exact.gradients.items():
        found = plain.gradients[name]
        assert found is not None
        assert gradient is not None
        rounding[name] = largest(found.double() - gradient)
        mean_rounding[name] = root_mean_square(found.double() - gradient)
        gain[name] = abs(fit_factor(found, gradient) - 1)
    if exact.dsinks_terms is not None and plain.dsinks_terms is not None:
        off = plain.dsinks_terms.double() - exact.dsinks_terms
        deviation = largest(off.square().sum((0, 2)).sqrt())
        rounding["dsinks"] = max(rounding["dsinks"], SINK_DEVIATIONS * deviation)
    scale = 0.0 if slope is None else abs(_scale_error(plain.out, exact.out, slope))
    return Expected(
        exact=exact,
        rounding=rounding,
        gain=gain,
        mean_rounding=mean_rounding,
        slope=slope,
        scale=scale,
    )


def check_values(
    probe: Probe, found: Result, expected: Expected
) -> tuple[list[Figure], list[Fault]]:
    """Compare a result with the expected one.

    Returns:
        A figure for each quantity that could be compared, and a fault for each broken rule.
    """
    case, inputs = probe.case, probe.inputs
    figures: list[Figure] = []
    faults: list[Fault] = []
    if found.out.shape != inputs.d_out.shape:
        text = f"{case.name}: output {tuple(found.out.shape)}, needed {tuple(inputs.d_out.shape)}"
        return figures, [Fault("numerics-fwd", text, noise_sensitive=False)]
    if found.out.dtype != inputs.q.dtype:
        text = f"{case.name}: output in {found.out.dtype}, needed {inputs.q.dtype}"
        faults.append(Fault("numerics-fwd", text.replace("torch.", ""), noise_sensitive=False))
    if found.overwritten:
        names = " and ".join(found.overwritten)
        text = f"{case.name}: the call wrote into {names}, which the model uses afterwards"
        faults.append(Fault("numerics-fwd", text, noise_sensitive=False))
    out = found.out[:, inputs.rows]
    is_token = inputs.documents[:, -found.out.shape[1] :] >= 0
    broken = list(_check_finite_and_nonzero(case, "out", found.out[is_token]))
    faults += broken
    if not broken:
        out = out * is_token[:, inputs.rows, None, None]
        figures.append(_compare(probe, "out", out, expected))
        faults += _check_bound(probe.backend, figures[-1])
        faults += _check_factor(probe, "out", out, expected)
        faults += _check_scale(probe, out, expected)
    for name, gradient in found.gradients.items():
        if gradient is None or not found.attached:
            text = f"{case.name}: no gradient reaches {name[1:]}"
            faults.append(Fault("grad-detached", text, noise_sensitive=False))
            continue
        # Plain attention's gradient is 0 as well where bfloat16 rounds all weights, or the tanh of
        # the soft cap, to 1.
        empty_ok = expected.rounding[name] >= largest(expected.of(name))
        broken = list(_check_finite_and_nonzero(case, name, gradient, empty_ok=empty_ok))
        faults += broken
        if not broken:
            figures.append(_compare(probe, name, gradient, expected))
            faults += _check_bound(probe.backend, figures[-1])
            faults += _check_factor(probe, name, gradient, expected)
    return figures, faults


def check_precision(probe: Probe, found: Result, expected: Expected) -> Iterator[Fault]:
    """Check the mean error of a call of long rows in half precision."""
    case, inputs = probe.case, probe.inputs
    if case.geometry.dtype == "float32" or inputs.q.shape[2] < MEAN_TOKENS:
        return
    for name, value in {"out": found.out[:, inputs.rows], **found.gradients}.items():
        if value is None or tolerance_factor(probe.backend, name) is None:
            continue
        exact, rounding = expected.of(name), expected.mean_rounding[name]
        if exact.numel() < GAIN_VALUES or not rounding:
            continue
        error, allowed = root_mean_square(value.double() - exact), MEAN_ROUNDING * rounding
        # `not <=` is also true for NaN.
        if not error <= allowed:
            text = (
                f"{case.name}: {name} is {error:.1e} off the reference on average, allowed"
                f" {allowed:.1e} ({MEAN_ROUNDING:g} times plain attention's)"
            )
            yield numerics_fault(name, text, error=error, allowed=allowed)


def check_finite(case: Case, found: Result) -> Iterator[Fault]:
    """Check that all gradients are finite, where check_values gets only a part of them."""
    for name, gradient in found.gradients.items():
        if gradient is not None:
            yield from _check_finite_and_nonzero(case, name, gradient, empty_ok=True)


def check_further_call(probe: Probe, what: str, found: Result, expected: Expected) -> list[Fault]:
    """Return the faults of another call of a probe; `what` is added to the case's name."""
    case = replace(probe.case, name=f"{probe.case.name}, {what}")
    return check_values(probe._replace(case=case), found, expected)[1]


def _check_finite_and_nonzero(
    case: Case, name: str, value: Tensor, *, empty_ok: bool = False
) -> Iterator[Fault]:
    """Check that values are finite and not all zero."""
    if not torch.isfinite(value).all():
        share = (~torch.isfinite(value)).double().mean().item()
        text = f"{case.name}: {share:.0%} of {name} is NaN or infinite"
        yield Fault("nan", text, noise_sensitive=False)
    elif not value.any() and not empty_ok:
        if name == "out":
            text = f"{case.name}: the whole output is 0"
            yield Fault("zeros", text, noise_sensitive=False)
        else:
            text = f"{case.name}: {name} is 0 everywhere: {name[1:]} would never learn"
            yield Fault("grad-detached", text, noise_sensitive=False)


def _compare(probe: Probe, name: str, found: Tensor, expected: Expected) -> Figure:
    """Return the error of one quantity, and what is allowed."""
    backend, case = probe.backend, probe.case
    exact = expected.of(name)
    difference = found.double() - exact
    if tolerance_factor(backend, name) is None:
        signal, noise = exact.square().sum().item(), difference.square().sum().item()
        decibels = 10 * math.log10(signal / noise) if signal and noise else math.inf
        # Quantizing scores around -110 loses all digits that matter to the softmax.
        judged = backend.sqnr_db is not None and case.scores == "spread"
        allowed = backend.sqnr_db if judged and backend.sqnr_db is not None else -math.inf
        return Figure(quantity=name, error=-decibels, allowed=-allowed, case=case.name)
    rounding, dtype = expected.rounding[name], case.geometry.dtype
    allowed = allowed_error(
        backend, name, dtype=dtype, scores=case.scores, rounding=rounding, size=largest(exact)
    )
    error = largest(difference)
    if error > allowed and (bounds := _rounding_bounds(probe, name, expected)) is not None:
        # The element that exceeds its own bound most.
        bounds = bounds.double() + allowed
        worst = (difference.abs() / bounds).flatten().argmax()
        error, allowed = (x.flatten()[worst].item() for x in (difference.abs(), bounds))
    return Figure(quantity=name, error=error, allowed=allowed, case=case.name)


def _rounding_bounds(probe: Probe, name: str, expected: Expected) -> Tensor | None:
    """Return bounds in addition to allowed_error, where plain attention's error is no measure.

    Returns:
        A bound for each element that is compared. None for calls where most queries see many keys
        of similar weight.
    """
    case, inputs = probe.case, probe.inputs
    few_keys = min(max(case.lengths), case.geometry.window or math.inf) <= SHORT
    if name == "dsinks" or probe.backend.pattern != "full":
        return None
    if not few_keys and case.scores not in ATOL_SHIFTED:
        return None
    unit = torch.finfo(inputs.q.dtype).eps / 2
    found = torch.stack([rounding_bounds(row, unit=unit)[name] for row in each_row(case, inputs)])
    if name == "out":
        return found.transpose(1, 2)[:, inputs.rows]
    if expected.sample is not None:
        heads, places = expected.sample
        return found[:, heads][:, :, places]
    return found


def tolerance_factor(backend: Backend, name: str) -> float | None:
    """Return how many times plain attention's error a backend may have in a quantity."""
    return backend.k_forward if name == "out" else backend.k_backward


def numerics_fault(name: str, text: str, *, error: float, allowed: float) -> Fault:
    """Return the fault of an output or a gradient whose error is larger than the allowed one."""
    code = "numerics-fwd" if name == "out" else "numerics-bwd"
    # Bounds in decibels are negative.
    close = error - allowed <= (NOISE_MARGIN - 1) * abs(allowed)
    return Fault(code, text, noise_sensitive=close)


def with_device_bounds(backend: Backend) -> Backend:
    """Return a backend with the bounds of the kernels that it has on this machine's GPU."""
    if torch.version.hip and backend.name == "flash_attention_2":
        return replace(backend, k_backward=K_BACKWARD_CK)
    return backend


def allowed_error(
    backend: Backend, name: str, *, dtype: DType, scores: Scores, rounding: float, size: float
) -> float:
    """Return how far a quantity of a backend with bounds may be from the reference.

    Args:
        backend: the backend whose bounds are used.
        name: "out", or the gradient.
        dtype: the precision of the call.
        scores: the distribution of its scores.
        rounding: largest error of plain attention in that precision.
        size: largest value of the reference.
    """
    factor = tolerance_factor(backend, name)
    assert factor is not None
    atol = ATOL[dtype]
    if name != "out":
        atol += ATOL_SHIFTED.get(scores, 0.0)
    return factor * rounding + atol * size


def _check_bound(backend: Backend, figure: Figure) -> Iterator[Fault]:
    """Check that an error is at most the allowed one."""
    if figure.error <= figure.allowed:
        return
    factor = tolerance_factor(backend, figure.quantity)
    rule = f"{factor:g} times plain attention's" if factor else "of the signal, in decibels"
    text = (
        f"{figure.case}: {figure.quantity} is {figure.error:.1e} off the reference,"
        f" allowed {figure.allowed:.1e} ({rule})"
    )
    yield numerics_fault(figure.quantity, text, error=figure.error, allowed=figure.allowed)


def _check_factor(probe: Probe, name: str, found: Tensor, expected: Expected) -> Iterator[Fault]:
    """Check that a quantity is not the reference times a factor other than 1."""
    case, exact = probe.case, expected.of(name)
    if tolerance_factor(probe.backend, name) is None or case.scores != "spread":
        return
    if exact.numel() < GAIN_VALUES:
        return
    factor = fit_factor(found, exact)
    atol = (GAIN_SAME_SIGN if expected.same_sign and name == "dv" else GAIN)[case.geometry.dtype]
    allowed = allowed_gain(probe.backend, name, atol=atol, gain=expected.gain[name])
    if abs(factor - 1) > allowed:
        allowed += _noise_of_factor(exact, _rounding_bounds(probe, name, expected))
    if abs(factor - 1) > allowed:
        text = (
            f"{case.name}: {name} is {factor:.4f} times the reference, allowed 1 +- {allowed:.1e}"
        )
        yield numerics_fault(name, text, error=abs(factor - 1), allowed=allowed)


def _noise_of_factor(exact: Tensor, bounds: Tensor | None) -> float:
    """Return how far rounding may move the factor of a quantity, in addition to allowed_gain.

    Errors of different tokens are independent, except where a value is below its bound: there all
    of it may be lost, as the gradient of a sink whose weight is below the output's rounding.
    """
    if bounds is None:
        return 0.0
    terms, lost = bounds.double() * exact.abs(), bounds >= exact.abs()
    independent = terms.masked_fill(lost, 0.0).sum(-1).square().sum().sqrt()
    together = terms.masked_fill(~lost, 0.0).sum()
    return float((independent + together) / exact.square().sum())


def _check_scale(probe: Probe, out: Tensor, expected: Expected) -> Iterator[Fault]:
    """Check that the output is that of the requested scale."""
    factor, exact, case = probe.backend.k_forward, expected.exact.out, probe.case
    if expected.slope is None or factor is None or exact.numel() < GAIN_VALUES:
        return
    off = _scale_error(out, exact, expected.slope)
    allowed = factor * expected.scale + SCALE[case.geometry.dtype]
    if abs(off) > allowed:
        text = (
            f"{case.name}: out is that of {1 + off:.4f} times the scale, allowed 1 +- {allowed:.1e}"
        )
        yield numerics_fault("out", text, error=abs(off), allowed=allowed)


def _scale_error(found: Tensor, exact: Tensor, slope: Tensor) -> float:
    """Return the relative error of the scale that fits an output best."""
    size = slope.square().sum().item()
    return ((found.double() - exact) * slope).sum().item() / size if size else 0.0


def allowed_gain(backend: Backend, name: str, *, atol: float, gain: float) -> float:
    """Return how far the factor of a quantity may be from 1; `gain` is plain attention's."""
    factor = tolerance_factor(backend, name)
    assert factor is not None
    return factor * gain + atol


def fit_factor(found: Tensor, exact: Tensor) -> float:
    """Return the factor that brings `exact` closest to `found`; 1 where `exact` is 0."""
    size = exact.square().sum().item()
    return (found.double() * exact).sum().item() / size if size else 1.0


def root_mean_square(value: Tensor) -> float:
    """Return the root of the mean square; 0 for an empty tensor."""
    return float(value.square().mean().sqrt()) if value.numel() else 0.0


def largest(value: Tensor) -> float:
    """Return the largest absolute value; 0 for an empty tensor."""
    return value.abs().max().item() if value.numel() else 0.0


def worst_figures(figures: Iterable[Figure]) -> list[Figure]:
    """Return, for each quantity, the figure that is closest to its bound or exceeds it most."""
    worst: dict[str, Figure] = {}
    for figure in figures:
        known = worst.get(figure.quantity)
        if known is None or margin(figure) > margin(known):
            worst[figure.quantity] = figure
    return list(worst.values())


def margin(figure: Figure) -> float:
    """Return the error as a share of the bound, or their difference in decibels; inf for NaN."""
    if math.isnan(figure.error):
        return math.inf
    if figure.error < 0 or figure.allowed <= 0:  # decibels
        return figure.error - figure.allowed
    return figure.error / figure.allowed


# A kernel may be noisier than float32 sums, such as one with sums in bfloat16. The differences of
# other calls may then be up to this many times those between repeats of one call.
REPEAT_MARGIN = 2.0


def check_repeated(
    case: Case, *, first: Result, second: Result, gradients_too: bool
) -> Iterator[Fault]:
    """Compare two calls with the same inputs, bit by bit."""
    if not torch.equal(first.out, second.out):
        text = (
            f"{case.name}: the same inputs gave outputs {_difference(first.out, second.out)} apart"
        )
        yield Fault("nondeterministic", text, noise_sensitive=True)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        if not gradients_too or gradient is None or other is None:
            continue
        if not torch.equal(gradient, other):
            text = f"{case.name}: the same inputs gave {name} {_difference(gradient, other)} apart"
            yield Fault("nondeterministic", text, noise_sensitive=True)


def check_isolated(
    case: Case,
    *,
    before: Sequence[Result],
    after: Sequence[Result],
    unchanged: Tensor,
    noise: dict[str, Tensor],
) -> Iterator[Fault]:
    """Check that tokens of other documents kept their outputs and gradients.

    Args:
        case: the probe.
        before: the results of at least two equal calls, before q, k and v of some documents were
            changed.
        after: the results of one or more equal calls after that change.
        unchanged: the tokens of the other documents, bool, (B, T).
        noise: reference.sum_order_bounds of the calls before the change.
    """
    if not torch.equal(before[0].out[unchanged], after[0].out[unchanged]):
        shift = _difference(before[0].out[unchanged], after[0].out[unchanged])
        text = f"{case.name}: changing one document moved the output of others by {shift}"
        yield Fault("packing-not-isolated", text, noise_sensitive=True)
    for name, bound_BTHD in noise.items():
        one, *same = _gradients_at(before, name, unchanged)
        other, *same_after = _gradients_at(after, name, unchanged)
        if one is None or other is None or torch.equal(one, other):
            continue
        again = [(one, x) for x in same] + [(other, x) for x in same_after]
        repeats = all(x is not None and torch.equal(x, reference) for reference, x in again)
        bound = bound_BTHD[unchanged].double()
        seen = max(_excess_ratio(reference, x, bound) for reference, x in again if x is not None)
        allowed = max(1.0, REPEAT_MARGIN * seen)
        # `not <=` is also true for NaN.
        if repeats or not _excess_ratio(one, other, bound) <= allowed:
            moved, by_itself = _difference(one, other), "does not move"
            if not repeats:
                excess = largest(difference_beyond_ulp(one, other))
                by_itself = (
                    f"moves by one rounding and a float32 sum's order, not {excess:.1e} more"
                )
            text = (
                f"{case.name}: changing one document moved {name} of others by {moved}"
                f" (by itself it {by_itself})"
            )
            yield Fault("packing-not-isolated", text, noise_sensitive=True)


def _gradients_at(results: Sequence[Result], name: str, tokens: Tensor) -> list[Tensor | None]:
    """Return a gradient at some tokens, (tokens, heads, D), for each result."""
    found = (result.gradients[name] for result in results)
    return [None if x is None else x.transpose(1, 2)[tokens] for x in found]


def _excess_ratio(one: Tensor, other: Tensor, bound: Tensor) -> float:
    """Return the largest difference beyond one unit in the last place, divided by the bound."""
    if torch.equal(one, other):
        return 0.0
    excess = difference_beyond_ulp(one, other)
    # 0 / 0 counts as 0: nothing may change and nothing does. NaN of a gradient stays NaN.
    return largest(torch.where(excess == 0, 0.0, excess / bound))


def _difference(one: Tensor, other: Tensor) -> str:
    return f"{largest(one.double() - other.double()):.1e}"

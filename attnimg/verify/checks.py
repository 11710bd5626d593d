"""Judge one probe: the rules that a call of a backend must keep.

Every rule that is broken is a Fault, whose reason has a code of its own. A kernel that is right may
break a rule once by what rounding or random numbers do in that call: such a fault is marked, and
candidate.py believes it when it occurs again.

What is compared bit by bit, and why a right kernel on a GPU passes: the inputs with a copy of them,
which hold no NaN and which autograd forbids to change; in training_conditions.py a result with a
copy of the same memory; outputs of equal calls, see check_repeated. Nothing else is: gradients may
move by reference.sum_noise, random numbers may go on (process_state.py), a dropout rate has 5
standard deviations and the coarsest kernel's step. The bounds here leave room for P and dS rounded
before they are multiplied, for exp2 in place of exp and for rescaling block by block: kernels that
do all of that come to half of them (tests/fixtures/noisy_kernels, docs/measured/proof-noise.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnimg.facts import Backend, DType, Figure, Reason
from attnimg.verify.calls import Result
from attnimg.verify.cases import Case, Scores
from attnimg.verify.inputs import Inputs
from attnimg.verify.reference import beyond_a_flip, rounding_of_output

# Allowed besides a multiple of plain attention's own error, as a share of the largest value: a few
# units in the last place, for where plain attention happens to be exact. In float32 more, since
# torch 2.13's CPU kernel has an exp() of its own and is 7e-6 off in dk (seen 2026-11-21).
ATOL = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}

# And for gradients where scores are in the hundreds: a flash kernel's backward goes by the
# log-sum-exp in float32, which has 8e-6 to 3e-5 between neighbours there. torch 2.13's CPU kernel
# is 4e-4 off in dq (seen 2026-11-21), plain attention 4e-5. Scores of -900 have 6e-5 between
# neighbours, and all of k is long there: torch's kernel is 9e-3 off where the scale is no power of
# 2, such as with head_dim 32 (seen 2026-11-27).
ATOL_SHIFTED = {"negative": 1e-3, "large": 1e-3, "hundreds": 1e-3, "below-hundreds": 2e-2}

# flash-attn's own bound for the gradients of its CK kernels, on AMD's GPUs.
# Source: flash-attention 2.8.3.post2, tests/test_flash_attn_ck.py (2026-11-21).
K_BACKWARD_CK = 10.0

# How far a quantity as a whole may be from 1 times the reference, besides a multiple of plain
# attention's own: rounding averages out there, and a wrong factor does not. Ours (2026-11-25);
# torch 2.13's CPU kernels stay below a sixth of it, plain attention below half.
GAIN = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 1e-2}

# The same for dv where the terms of its sums have the same sign. Kernels that add them up in
# float32 are up to 0.0011 off in bfloat16; sums in bfloat16 are 0.008 to 0.012 off where they are
# rounded after every 16 of 512 to 829 rows, and 0.002 to 0.006 after every 32. Not for dk: a right
# kernel was 0.005 off (torch 2.13's on a CPU, head_dim 128). Ours (2026-11-27).
GAIN_ALIKE = GAIN | {"bfloat16": 5e-3}

# Up to so many tokens plain attention's own error in dq and dk is a draw of few numbers; see
# reference.rounding_of_output. A right kernel with 3 tokens in float16 was 1.1 times what that
# allowed (benchmarks/proof_noise.py, 2026-11-27).
SHORT = 16

# The same for the scale of the scores, which a kernel may round to the run's precision; the gain of
# the output hardly shows it. Ours (2026-11-27).
SCALE = {"float32": 1e-4, "float16": 3e-3, "bfloat16": 7e-3}

# Over fewer values rounding does not average out.
GAIN_VALUES = 4096

# Values up to so many times the allowed error off are taken for noise until they are seen again.
NEAR = 2.0

# Each head has one value of dsinks, a sum over all queries that may cancel: plain attention's own
# error in it is a draw of few numbers, and right kernels had up to 4 times the bound that it gave.
# The root of the squared errors of the sum's terms is the standard deviation of such a draw; so
# many of these count as plain attention's error. transformers' eager attention, and kernels that
# round P or out before they are used, stay below 0.45 of the bound (1620 probes, 2026-11-27).
SINK_DEVIATIONS = 2.0

# Reported first, as the likely cause of the others.
ORDER = (
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
    """What a case should give: the result in float64, and how far plain attention is from it.

    Attributes:
        exact: in float64.
        rounding: largest error of plain attention in the run's precision, for each quantity; of
            dsinks, what it may come to.
        gain: by how much plain attention as a whole is off by a factor, for each quantity.
        slope: how the output changes with the logarithm of the scale; None where it is not judged.
        scale: by how much plain attention's scale seems to be off.
        alike: whether the terms of dv have the same sign; see check_whole_row.
    """

    exact: Result
    rounding: dict[str, float]
    gain: dict[str, float]
    slope: Tensor | None = None
    scale: float = 0.0
    alike: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A rule that a call broke.

    Attributes:
        reason: what the user is told.
        noise_sensitive: whether rounding or random numbers may break the rule for a right kernel
            in one call, but hardly in two.
    """

    reason: Reason
    noise_sensitive: bool


def expected(exact: Result, plain: Result, *, slope: Tensor | None = None) -> Expected:
    """Measure plain attention in the run's precision against float64; see Expected.slope."""
    rounding = {"out": largest(plain.out.double() - exact.out)}
    gain = {"out": abs(gain_of(plain.out, exact.out) - 1)}
    for name, gradient in exact.gradients.items():
        found = plain.gradients[name]
        assert found is not None
        assert gradient is not None
        rounding[name] = largest(found.double() - gradient)
        gain[name] = abs(gain_of(found, gradient) - 1)
    if exact.dsinks_terms is not None and plain.dsinks_terms is not None:
        off = plain.dsinks_terms.double() - exact.dsinks_terms
        deviation = largest(off.square().sum((0, 2)).sqrt())
        rounding["dsinks"] = max(rounding["dsinks"], SINK_DEVIATIONS * deviation)
    scale = 0.0 if slope is None else abs(_scale_error(plain.out, exact.out, slope))
    return Expected(exact=exact, rounding=rounding, gain=gain, slope=slope, scale=scale)


def check_values(
    backend: Backend, case: Case, inputs: Inputs, *, found: Result, right: Expected
) -> tuple[list[Figure], list[Fault]]:
    """Compare a result with what is expected.

    Returns:
        A figure for each quantity that could be compared, and every rule that was broken.
    """
    figures: list[Figure] = []
    faults: list[Fault] = []
    if found.out.shape != inputs.d_out.shape:
        text = f"{case.name}: output {tuple(found.out.shape)}, needed {tuple(inputs.d_out.shape)}"
        return figures, [fault("numerics-fwd", text, noise_sensitive=False)]
    if found.out.dtype != inputs.q.dtype:
        text = f"{case.name}: output in {found.out.dtype}, needed {inputs.q.dtype}"
        faults.append(fault("numerics-fwd", text.replace("torch.", ""), noise_sensitive=False))
    if found.overwritten:
        names = " and ".join(found.overwritten)
        text = f"{case.name}: the call wrote into {names}, which the model goes on to use"
        faults.append(fault("numerics-fwd", text, noise_sensitive=False))
    out = found.out[:, inputs.rows]
    is_token = inputs.documents[:, -found.out.shape[1] :] >= 0
    unsound = list(_is_sound(case, "out", found.out[is_token]))
    faults += unsound
    if not unsound:
        exact = right.exact.out
        out = out * is_token[:, inputs.rows, None, None]
        figure = _compare(backend, case, inputs, name="out", pair=(out, exact), right=right)
        figures.append(figure)
        faults += _out_of_bounds(backend, figure, code="numerics-fwd")
        faults += _off_by_a_factor(backend, case, name="out", pair=(out, exact), right=right)
        faults += _off_in_scale(backend, case, pair=(out, exact), right=right)
    for name, gradient in found.gradients.items():
        if gradient is None or not found.attached:
            text = f"{case.name}: no gradient reaches {name[1:]}"
            faults.append(fault("grad-detached", text, noise_sensitive=False))
            continue
        exact_gradient = right.exact.gradients[name]
        assert exact_gradient is not None
        # Plain attention's is 0 as well where bfloat16 rounds all weights, or tanh of a cap, to 1.
        empty_ok = right.rounding[name] >= largest(exact_gradient)
        unsound = list(_is_sound(case, name, gradient, empty_ok=empty_ok))
        faults += unsound
        if not unsound:
            pair = (gradient, exact_gradient)
            figure = _compare(backend, case, inputs, name=name, pair=pair, right=right)
            figures.append(figure)
            faults += _out_of_bounds(backend, figure, code="numerics-bwd")
            faults += _off_by_a_factor(backend, case, name=name, pair=pair, right=right)
    return figures, faults


def check_finite(case: Case, found: Result) -> Iterator[Fault]:
    """Require finite gradients everywhere, where check_values is to see a part of them."""
    for name, gradient in found.gradients.items():
        if gradient is not None:
            yield from _is_sound(case, name, gradient, empty_ok=True)


def fault(code: str, text: str, *, noise_sensitive: bool) -> Fault:
    """Build a fault."""
    return Fault(reason=Reason(code=code, text=text), noise_sensitive=noise_sensitive)


def check_further_call(
    backend: Backend, case: Case, inputs: Inputs, what: str, *, found: Result, right: Expected
) -> list[Fault]:
    """Return the rules that another call of a case breaks; `what` is added to the case's name."""
    named = replace(case, name=f"{case.name}, {what}")
    return check_values(backend, named, inputs, found=found, right=right)[1]


def _is_sound(case: Case, name: str, value: Tensor, *, empty_ok: bool = False) -> Iterator[Fault]:
    """Require finite values that are not all zero."""
    if not torch.isfinite(value).all():
        share = (~torch.isfinite(value)).double().mean().item()
        text = f"{case.name}: {share:.0%} of {name} is NaN or infinite"
        yield fault("nan", text, noise_sensitive=False)
    elif not value.any() and not empty_ok:
        if name == "out":
            text = f"{case.name}: the whole output is 0"
            yield fault("zeros", text, noise_sensitive=False)
        else:
            text = f"{case.name}: {name} is 0 everywhere: {name[1:]} would never learn"
            yield fault("grad-detached", text, noise_sensitive=False)


def _compare(
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    name: str,
    pair: tuple[Tensor, Tensor],
    right: Expected,
) -> Figure:
    """Return the error of one quantity, found and exact, and what is allowed."""
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
    size = largest(exact)
    if not size:
        # dq and dk of a lone token: what is left when two equal terms of this size are subtracted.
        size = largest(inputs.d_out) * largest(inputs.v) * inputs.v.shape[-1]
        size *= inputs.scale * max(largest(inputs.q), largest(inputs.k))
    rounding, dtype = right.rounding[name], case.geometry.dtype
    allowed = allowed_error(
        backend, name, dtype=dtype, scores=case.scores, rounding=rounding, size=size
    )
    short = max(case.lengths) <= SHORT and case.queries is None and backend.pattern == "full"
    if short and name in ("dq", "dk") and exact.any():
        allowed = max(allowed, rounding_of_output(case, inputs)[name])
    return Figure(quantity=name, error=largest(difference), allowed=allowed, case=case.name)


def with_bounds_here(backend: Backend) -> Backend:
    """Return a backend with the bounds of the kernels that it has on this machine's GPU."""
    if torch.version.hip and backend.name == "flash_attention_2":
        return replace(backend, k_backward=K_BACKWARD_CK)
    return backend


def allowed_error(
    backend: Backend, name: str, *, dtype: DType, scores: Scores, rounding: float, size: float
) -> float:
    """Return how far a quantity of a backend with bounds may be from the reference.

    Args:
        backend: whose bounds count.
        name: "out", or the gradient.
        dtype: the precision of the call.
        scores: what its scores look like.
        rounding: largest error of plain attention in that precision.
        size: largest value of the reference.
    """
    factor = backend.k_forward if name == "out" else backend.k_backward
    assert factor is not None
    atol = ATOL[dtype]
    if name != "out":
        atol += ATOL_SHIFTED.get(scores, 0.0)
    return factor * rounding + atol * size


def _out_of_bounds(backend: Backend, figure: Figure, *, code: str) -> Iterator[Fault]:
    if figure.error <= figure.allowed:
        return
    factor = backend.k_forward if figure.quantity == "out" else backend.k_backward
    rule = f"{factor:g} times plain attention's" if factor else "of the signal, in decibels"
    text = (
        f"{figure.case}: {figure.quantity} is {figure.error:.1e} off the reference,"
        f" allowed {figure.allowed:.1e} ({rule})"
    )
    # Decibels are below 0.
    near = figure.error - figure.allowed <= (NEAR - 1) * abs(figure.allowed)
    yield fault(code, text, noise_sensitive=near)


def _off_by_a_factor(
    backend: Backend, case: Case, *, name: str, pair: tuple[Tensor, Tensor], right: Expected
) -> Iterator[Fault]:
    """Require that a quantity as a whole is 1 times the reference."""
    factor = backend.k_forward if name == "out" else backend.k_backward
    if factor is None or case.scores != "spread" or pair[1].numel() < GAIN_VALUES:
        return
    found = gain_of(*pair)
    atol = (GAIN_ALIKE if right.alike and name == "dv" else GAIN)[case.geometry.dtype]
    allowed = allowed_gain(backend, name, atol=atol, gain=right.gain[name])
    if abs(found - 1) > allowed:
        text = f"{case.name}: {name} is {found:.4f} times the reference, allowed 1 +- {allowed:.1e}"
        code = "numerics-fwd" if name == "out" else "numerics-bwd"
        near = abs(found - 1) <= NEAR * allowed
        yield fault(code, text, noise_sensitive=near)


def _off_in_scale(
    backend: Backend, case: Case, *, pair: tuple[Tensor, Tensor], right: Expected
) -> Iterator[Fault]:
    """Require that the output is that of the scale which was asked for."""
    if right.slope is None or backend.k_forward is None or pair[1].numel() < GAIN_VALUES:
        return
    off = _scale_error(*pair, right.slope)
    allowed = backend.k_forward * right.scale + SCALE[case.geometry.dtype]
    if abs(off) > allowed:
        text = (
            f"{case.name}: out is that of {1 + off:.4f} times the scale, allowed 1 +- {allowed:.1e}"
        )
        yield fault("numerics-fwd", text, noise_sensitive=abs(off) <= NEAR * allowed)


def _scale_error(found: Tensor, exact: Tensor, slope: Tensor) -> float:
    """Return the change of the scale, as a share of it, that explains an output best."""
    size = slope.square().sum().item()
    return ((found.double() - exact) * slope).sum().item() / size if size else 0.0


def allowed_gain(backend: Backend, name: str, *, atol: float, gain: float) -> float:
    """Return how far the factor of a quantity may be from 1; `gain` is plain attention's."""
    factor = backend.k_forward if name == "out" else backend.k_backward
    assert factor is not None
    return factor * gain + atol


def gain_of(found: Tensor, exact: Tensor) -> float:
    """Return the factor that brings `exact` closest to `found`; 1 where there is nothing."""
    size = exact.square().sum().item()
    return (found.double() * exact).sum().item() / size if size else 1.0


def largest(value: Tensor) -> float:
    """Return the largest absolute value; 0 where there is none."""
    return value.abs().max().item() if value.numel() else 0.0


# A kernel may be noisier than float32 sums are, such as one with sums in bfloat16: how far repeats
# of one call are apart, as a multiple of the bound, holds for other calls up to this factor.
BEYOND_SEEN = 2.0


def check_repeated(
    case: Case, *, first: Result, second: Result, gradients_too: bool
) -> Iterator[Fault]:
    """Compare two calls with the same inputs, bit by bit."""
    if not torch.equal(first.out, second.out):
        text = (
            f"{case.name}: the same inputs gave outputs {_difference(first.out, second.out)} apart"
        )
        yield fault("nondeterministic", text, noise_sensitive=True)
    for name, gradient in first.gradients.items():
        other = second.gradients[name]
        if not gradients_too or gradient is None or other is None:
            continue
        if not torch.equal(gradient, other):
            text = f"{case.name}: the same inputs gave {name} {_difference(gradient, other)} apart"
            yield fault("nondeterministic", text, noise_sensitive=True)


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
        noise: reference.sum_noise of the call before.
    """
    if not torch.equal(before[0].out[kept], after[0].out[kept]):
        shift = _difference(before[0].out[kept], after[0].out[kept])
        text = f"{case.name}: changing one document moved the output of others by {shift}"
        yield fault("packing-not-isolated", text, noise_sensitive=True)
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
            moved, by_itself = _difference(one, other), "does not move"
            if not repeats:
                excess = largest(beyond_a_flip(one, other))
                by_itself = (
                    f"moves by one rounding and a float32 sum's order, not {excess:.1e} more"
                )
            text = (
                f"{case.name}: changing one document moved {name} of others by {moved}"
                f" (by itself it {by_itself})"
            )
            yield fault("packing-not-isolated", text, noise_sensitive=True)


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


def _difference(one: Tensor, other: Tensor) -> str:
    return f"{largest(one.double() - other.double()):.1e}"

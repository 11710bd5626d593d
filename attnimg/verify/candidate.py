"""Prove one backend on one geometry: run all probes, and check all rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from attnimg.errors import exception_text
from attnimg.facts import AttentionFunction, Backend, Figure, Geometry, Pattern, Reason
from attnimg.verify.calls import (
    Inputs,
    Result,
    backward,
    call,
    draw,
    forward,
    forward_only,
)
from attnimg.verify.cases import Budget, Case, budget_of, cases_of
from attnimg.verify.checks import (
    ORDER,
    Expected,
    Fault,
    check_further_call,
    check_isolated,
    check_repeated,
    check_values,
    expected,
)
from attnimg.verify.process_state import leaks
from attnimg.verify.reference import reference, slope_of_scale, sum_noise
from attnimg.verify.training_conditions import (
    builds_plans,
    check_dropout,
    check_training_conditions,
    check_whole_row,
    compiling_each_shape,
    few_shapes,
    is_compiled,
)

# Expected results, shared by all backends of a pattern that are proven in one process.
References = dict[tuple[Pattern, Case], Expected]
# How often a probe, and then the whole proof, is repeated if noise may have broken a rule.
AGAIN = 2
# Up to this many tokens, a probe's call is also checked without gradients; check_whole_row does
# that for the longest rows.
_EVALUATED = 1024
# Further equal calls that show whether gradients that changed are nondeterministic.
MORE = 3


class Findings(NamedTuple):
    """The results of the probes.

    Attributes:
        figures: for each quantity, the figure that is closest to its bound.
        reasons: broken rules; one that noise may break is included only if it broke again.
        cases: how many probes were run.
        unrepeated: rules that were broken once, but not when the probe was repeated.
        raises: calls that training never makes, and what the kernel raised in them.
    """

    figures: list[Figure]
    reasons: list[Reason]
    cases: int
    unrepeated: list[Reason]
    raises: tuple[str, ...] = ()


def prove_geometry(
    function: AttentionFunction,
    backend: Backend,
    geometry: Geometry,
    *,
    device: str,
    references: References,
    starting: Callable[[str], None],
    again: Callable[[], None],
) -> Findings:
    """Run every probe of a geometry; repeat those that a correct kernel may have failed by noise.

    A fault that noise may have caused counts only if there is a second one: in one of AGAIN further
    runs of that probe, in another probe, or in one of AGAIN further runs of all probes. The inputs
    stay the same, so that a real fault occurs again; only the kernel's own noise and, with dropout,
    the random numbers change. If a correct kernel fails once in a proof with a small probability p,
    it is refused with a probability of about 2 * p * p. A kernel that is wrong only in some calls
    passes after a fault only if all calls of two further proofs, several hundred, are right. A
    fault that noise can't cause counts at once.

    A kernel may raise in the probes with fewer queries than keys, which are calls with a key-value
    cache: training makes no such calls. A wrong result in them is a fault nevertheless.

    Args:
        function: the backend's attention function.
        backend: has the bounds that its results are compared with.
        geometry: the run's.
        device: "cpu" or "cuda".
        references: cache of expected results; missing ones are added.
        starting: called with a probe's name before it is run, so that the parent process can name
            it if this process dies.
        again: called before all probes are repeated, which takes as long as the first time.

    Raises:
        Exception: whatever a kernel raises in a call that training makes.
    """
    probes = partial(
        _run_probes,
        function,
        backend,
        geometry,
        device=device,
        references=references,
        starting=starting,
    )
    found = probes()
    for _ in range(AGAIN if found.unrepeated else 0):
        again()
        further = probes()
        if further.reasons or further.unrepeated:
            reasons = _first_of_each(found.unrepeated + further.reasons + further.unrepeated)
            return further._replace(reasons=reasons, unrepeated=[])
    return found


def _run_probes(
    function: AttentionFunction,
    backend: Backend,
    geometry: Geometry,
    *,
    device: str,
    references: References,
    starting: Callable[[str], None],
) -> Findings:
    """Run every probe of a geometry, and repeat each one that may have failed by noise."""
    figures: list[Figure] = []
    reasons: list[Reason] = []
    unrepeated: list[Reason] = []
    raises: list[str] = []
    cases = cases_of(geometry, budget=budget_here(backend, device=device))
    if backend.pattern == "shifted":
        # s2 supports neither packed rows nor a cache. In rows of up to 8 tokens most tokens see
        # only themselves: their gradients are pure rounding, for which there is no bound.
        cases = [
            case
            for case in cases
            if not case.packed and case.queries is None and max(case.lengths) > 8
        ]
    plans = builds_plans(backend, device=device, capability=_capability(device))
    if plans or is_compiled(backend, device=device):
        cases = few_shapes(cases)
    for case in cases:
        # The slowest probes are skipped for a kernel that is refused already.
        if reasons and case.also_learning:
            continue
        starting(case.name)
        inputs = draw(case, device=device)
        right = references.get((backend.pattern, case))
        if right is None:
            right = references[backend.pattern, case] = _expected(case, inputs, backend.pattern)
        probe = partial(
            _run_probe, function, backend, case, inputs, right=right, references=references
        )
        try:
            with compiling_each_shape(backend, device=device):
                found = _run_and_confirm(probe, refused=bool(reasons))
        # Kernels may raise anything. A fault that an earlier probe found is more informative.
        except Exception as error:
            if reasons:
                break
            if case.in_training:
                raise
            # If the error broke the CUDA context, the next probe raises as well.
            raises.append(f"{case.name}: {exception_text(error)}")
            continue
        figures += found.figures
        reasons += found.reasons
        unrepeated += found.unrepeated
    if geometry.dropout:
        starting("dropout")
        seeds = itertools.count()

        def drop() -> tuple[list[Figure], list[Fault]]:
            faults = check_dropout(function, backend, geometry, device=device, seed=next(seeds))
            return [], list(faults)

        found = _run_and_confirm(drop, refused=bool(reasons))
        reasons += found.reasons
        unrepeated += found.unrepeated
    if reasons or len(unrepeated) > 1:
        reasons, unrepeated = reasons + unrepeated, []
    probed = len(cases) - len(raises)
    return Findings(_worst(figures), _first_of_each(reasons), probed, unrepeated, tuple(raises))


def _expected(case: Case, inputs: Inputs, pattern: Pattern) -> Expected:
    """Compute the expected results of a probe, in some with their derivative by the scale."""
    exact, plain = (
        reference(case, inputs, dtype=dtype, pattern=pattern)
        for dtype in (torch.float64, inputs.q.dtype)
    )
    slope = None
    if case.repeated or case.also_learning:
        slope = slope_of_scale(case, inputs, pattern=pattern, exact=exact)
    return expected(exact, plain, slope=slope)


def _run_and_confirm(
    probe: Callable[[], tuple[list[Figure], list[Fault]]], *, refused: bool
) -> Findings:
    """Run a probe; repeat it if noise may have caused all of its faults.

    Args:
        probe: runs the probe's calls, and returns figures and faults.
        refused: whether the kernel is refused already, whatever this probe finds.
    """
    figures, faults = probe()
    reasons = [fault.reason for fault in faults]
    if not faults or refused or any(not fault.noise_sensitive for fault in faults):
        return Findings(figures, reasons, 1, [])
    for _ in range(AGAIN):
        try:
            further_figures, further = probe()
        # Kernels may raise anything. The fault that the first run found is more informative.
        except Exception:
            return Findings(figures, reasons, 1, [])
        if further:
            return Findings(figures, reasons, 1, [])
    # One per probe: the caller refuses a kernel with two of them.
    return Findings(further_figures, [], 1, reasons[:1])


def _run_probe(
    function: AttentionFunction,
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    right: Expected,
    references: References,
) -> tuple[list[Figure], list[Fault]]:
    """Run the calls of one probe, and return the figures and the faults."""
    found = call(function, backend, case, inputs)
    figures, faults = check_values(backend, case, inputs, found=found, right=right)
    further: list[Iterator[Fault]] = []
    if case.repeated:
        further = [
            _repeated(function, backend, case, inputs, first=found, right=right),
            check_training_conditions(function, backend, case, inputs, right=right),
        ]
    elif case.also_learning:
        further = [
            check_whole_row(function, backend, case, inputs, right=right, references=references)
        ]
    elif sum(case.lengths) <= _EVALUATED and not is_compiled(backend, device=inputs.q.device.type):
        if case.scores == "flat":
            further = [_q_alone(function, backend, case, inputs, right=right)]
        if case.packed:
            further += [_without_gradients(function, backend, case, inputs, right=right)]
    try:
        for fault in itertools.chain(*further):
            faults.append(fault)
    # Kernels may raise anything. A fault that an earlier call found is more informative.
    except Exception:
        if not faults:
            raise
    return figures, faults


def budget_here(backend: Backend, *, device: str) -> Budget:
    """Return the budget of a backend's probes on this machine's device."""
    if device == "cpu":
        return budget_of(backend, memory_bytes=None)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return budget_of(backend, memory_bytes=properties.total_memory)


def repeat_calls(
    function: AttentionFunction,
    backend: Backend,
    geometry: Geometry,
    *,
    device: str,
    references: References,
) -> tuple[list[str], list[Reason]]:
    """Repeat a training call and an evaluation call, and check the results of the last ones.

    Returns:
        Descriptions of what grew in the process with each call (leaks), and the rules that the last
        calls broke: a kernel may be wrong only after some number of calls.

    Raises:
        Exception: whatever the kernel raises.
    """
    cases = cases_of(geometry, budget=budget_here(backend, device=device))
    # s2 does not support packed rows.
    kind = geometry.packing and backend.pattern == "full"
    case = next(c for c in cases if c.packed == kind and c.scale_factor != 1)
    inputs = draw(case, device=device)
    right = references.get((backend.pattern, case)) or _expected(case, inputs, backend.pattern)

    def again() -> tuple[Result, Result]:
        with torch.no_grad():
            evaluated = forward_only(forward(function, backend, case, inputs))
        return call(function, backend, case, inputs), evaluated

    def again_and_size() -> int:
        found, _ = again()
        results = [found.out, *(g for g in found.gradients.values() if g is not None)]
        return sum(x.numel() * x.itemsize for x in results)

    def judge() -> tuple[list[Figure], list[Fault]]:
        judged = [
            check_further_call(backend, case, inputs, "repeated", found=found, right=right)
            for found in again()
        ]
        return [], list(itertools.chain(*judged))

    with compiling_each_shape(backend, device=device):
        leaking = leaks(again_and_size)
        found = _run_and_confirm(judge, refused=False)
    return leaking, found.reasons


def _without_gradients(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Check the call without gradients, as evaluation makes it."""
    with torch.no_grad():
        found = forward_only(forward(function, backend, case, inputs))
    yield from check_further_call(
        backend, case, inputs, "without gradients", found=found, right=right
    )


def _q_alone(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, right: Expected
) -> Iterator[Fault]:
    """Check the call of a model whose only adapter is on q."""
    found = backward(forward(function, backend, case, inputs, learning=("dq",)))
    yield from check_further_call(
        backend, case, inputs, "gradients of q alone", found=found, right=right
    )


def merge(found: Iterable[Findings]) -> Findings:
    """Join the findings of several geometries: the worst figures, the first of each reason."""
    figures: list[Figure] = []
    reasons: list[Reason] = []
    unrepeated: list[Reason] = []
    cases = 0
    raises: list[str] = []
    for findings in found:
        figures += findings.figures
        reasons += findings.reasons
        unrepeated += findings.unrepeated
        cases += findings.cases
        raises += findings.raises
    alike = tuple(dict.fromkeys(raises))
    return Findings(_worst(figures), _first_of_each(reasons), cases, unrepeated, alike)


def _repeated(
    function: AttentionFunction,
    backend: Backend,
    case: Case,
    inputs: Inputs,
    *,
    first: Result,
    right: Expected,
) -> Iterator[Fault]:
    """Check a repeated call; with packed documents, also one where some of them are changed."""
    same = partial(call, function, backend, case, inputs)
    before = [first, same()]
    asked = case.geometry.deterministic
    if asked or case.packed:
        yield from check_repeated(case, first=first, second=before[1], gradients_too=asked)
    # A call that was right once may be wrong when repeated.
    yield from check_values(backend, case, inputs, found=before[1], right=right)[1]
    if not case.packed or first.out.shape != inputs.d_out.shape:
        return
    noise = sum_noise(case, inputs)
    n_documents = len(case.lengths)
    for one in (0, n_documents // 2, n_documents - 1):
        changed = inputs.documents == one
        moved = [torch.where(changed[:, None, :, None], -x.flip(-1), x) for x in _qkv(inputs)]
        d_out = torch.where(changed[:, :, None, None], -inputs.d_out.flip(-1), inputs.d_out)
        other = replace(inputs, **dict(zip("qkv", moved, strict=True)), d_out=d_out)
        after = [call(function, backend, case, other)]
        kept = ~changed & (inputs.documents >= 0)
        judge = partial(check_isolated, case, kept=kept, noise=noise)
        if any(judge(before=before, after=after)):
            # Two calls may agree by chance: more are needed to see whether gradients repeat.
            before += [same() for _ in range(MORE)]
            after += [call(function, backend, case, other) for _ in range(MORE)]
            yield from judge(before=before, after=after)


def _capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU."""
    nvidia = device == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability() if nvidia else None


def _qkv(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs.q, inputs.k, inputs.v


def _worst(figures: list[Figure]) -> list[Figure]:
    """Return, for each quantity, the figure that is closest to its bound or exceeds it most."""
    worst: dict[str, Figure] = {}
    for figure in figures:
        kept = worst.get(figure.quantity)
        if kept is None or _margin(figure) > _margin(kept):
            worst[figure.quantity] = figure
    return list(worst.values())


def _margin(figure: Figure) -> float:
    if figure.error < 0 or figure.allowed <= 0:  # decibels
        return figure.error - figure.allowed
    return figure.error / figure.allowed


def _first_of_each(reasons: list[Reason]) -> list[Reason]:
    """Return the first reason of each code, in the order of checks.ORDER."""
    first: dict[str, Reason] = {}
    for reason in reasons:
        first.setdefault(reason.code, reason)
    return sorted(first.values(), key=lambda reason: ORDER.index(reason.code))

"""Prove one backend on one geometry: run all probes, and check all rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from attnimg.errors import exception_text
from attnimg.facts import AttentionFunction, Backend, Pattern
from attnimg.run_facts import Figure, Geometry, Reason
from attnimg.verification.calls import (
    Probe,
    Result,
    call,
    draw_inputs,
    forward,
    forward_only,
)
from attnimg.verification.cases import Budget, Case, choose_budget, list_cases, reduce_shapes
from attnimg.verification.checks import (
    CODE_ORDER,
    Expected,
    Fault,
    build_expected,
    check_further_call,
    check_isolated,
    check_precision,
    check_repeated,
    check_values,
    worst_figures,
)
from attnimg.verification.process_state import leaks
from attnimg.verification.reference import reference, scale_derivative, sum_order_bounds
from attnimg.verification.training_conditions import (
    builds_cudnn_plans,
    check_dropout,
    check_full_row,
    check_gradients_of,
    check_training_conditions,
    check_without_gradients,
    compiling_each_shape,
    is_compiled,
)

# Expected results, shared by all backends of a pattern that are proven in one process.
References = dict[tuple[Pattern, Case], Expected]

# How often a probe, and then the whole proof, is repeated if noise may have broken a rule.
REPEATS = 2

# Up to this many tokens, a probe's call is also checked without gradients; check_full_row does
# that for the longest rows.
_MAX_EVALUATED = 1024

# Further equal calls that show whether gradients that changed are nondeterministic. If one element
# differs in a third of all calls, 2 + 3 and 1 + 3 calls agree among themselves and not with each
# other once in 400 times; 2 + 8 and 1 + 8 calls do so once in 750,000 times.
EXTRA_CALLS = 8


class Findings(NamedTuple):
    """The results of the probes.

    Attributes:
        figures: for each quantity, the figure that is closest to its bound.
        reasons: broken rules; one that noise may break is included only if it broke again.
        cases: how many probes were run.
        unrepeated: rules that were broken once, but not when the probe was repeated.
        raised: calls that training never makes, and what the kernel raised in them.
    """

    figures: list[Figure]
    reasons: list[Reason]
    cases: int
    unrepeated: list[Reason]
    raised: tuple[str, ...] = ()


def prove_geometry(
    function: AttentionFunction,
    backend: Backend,
    geometry: Geometry,
    *,
    device: str,
    references: References,
    on_probe: Callable[[str], None],
    on_repeat: Callable[[], None],
) -> Findings:
    """Run every probe of a geometry; repeat those that a correct kernel may have failed by noise.

    A fault that noise may have caused counts only if there is a second one: when that probe is
    repeated up to REPEATS times, in another probe, or when all probes are repeated up to REPEATS
    times. The inputs stay the same, so that a real fault occurs again; only the kernel's own noise
    and, with dropout, the random numbers change. If a correct kernel fails once in a proof with a
    small probability p, it is refused with a probability of about 2 * p * p. A kernel that is wrong
    only in some calls passes after a fault only if all calls of two further proofs, several
    hundred, are right. A fault that noise can't cause counts at once.

    A kernel may raise in the probes with fewer queries than keys, which are calls with a KV cache:
    training makes no such calls. A wrong result in them is a fault nevertheless.

    Args:
        function: the backend's attention function.
        backend: its bounds apply to the results.
        geometry: the run's.
        device: "cpu" or "cuda".
        references: cache of expected results; missing ones are added.
        on_probe: called with a probe's name before it is run, so that the parent process can name
            it if this process dies.
        on_repeat: called before all probes are repeated, which takes as long as the first time.

    Raises:
        Exception: whatever a kernel raises in a call that training makes.
    """
    run_probes = partial(
        _run_probes,
        function,
        backend,
        geometry,
        device=device,
        references=references,
        on_probe=on_probe,
    )
    found = run_probes()
    for _ in range(REPEATS if found.unrepeated else 0):
        on_repeat()
        further = run_probes()
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
    on_probe: Callable[[str], None],
) -> Findings:
    """Run every probe of a geometry, and repeat each one that may have failed by noise."""
    found: list[Findings] = []
    refused = False
    cases = list_cases(geometry, budget=device_budget(backend, device=device))
    if backend.pattern == "shifted":
        # s2 supports neither packed rows nor a cache. In rows of up to 8 tokens most tokens see
        # only themselves: their gradients are pure rounding, for which there is no bound.
        cases = [
            case
            for case in cases
            if not case.packed and case.queries is None and max(case.lengths) > 8
        ]
    plans = builds_cudnn_plans(backend, device=device, capability=_capability(device))
    if plans or is_compiled(backend, device=device):
        cases = reduce_shapes(cases)
    for case in cases:
        # The slowest probes are skipped for a kernel that is refused already.
        if refused and case.extra_gradients:
            continue
        on_probe(case.name)
        probe = Probe(function, backend, case, draw_inputs(case, device=device))
        expected = references.get((backend.pattern, case))
        if expected is None:
            expected = references[backend.pattern, case] = _compute_expected(probe)
        run = partial(_run_probe, probe, expected, references)
        try:
            with compiling_each_shape(backend, device=device):
                found.append(_run_and_confirm(run, refused=refused))
        # Kernels may raise anything. A fault that an earlier probe found is more informative.
        except Exception as error:
            if refused:
                break
            if case.in_training:
                raise
            # If the error broke the CUDA context, the next probe raises as well.
            found.append(Findings([], [], 0, [], (f"{case.name}: {exception_text(error)}",)))
        refused = refused or bool(found[-1].reasons)
    if geometry.dropout:
        on_probe("dropout")
        seeds = itertools.count()

        def run_dropout() -> tuple[list[Figure], list[Fault]]:
            faults = check_dropout(function, backend, geometry, device=device, seed=next(seeds))
            return [], list(faults)

        found.append(_run_and_confirm(run_dropout, refused=refused)._replace(cases=0))
    merged = merge(found)._replace(cases=len(cases) - sum(len(part.raised) for part in found))
    if merged.reasons or len(merged.unrepeated) > 1:
        reasons = _first_of_each(merged.reasons + merged.unrepeated)
        return merged._replace(reasons=reasons, unrepeated=[])
    return merged


def _compute_expected(probe: Probe) -> Expected:
    """Compute the expected result of a probe, in some with its derivative by the scale."""
    case, inputs, pattern = probe.case, probe.inputs, probe.backend.pattern
    exact = reference(case, inputs, dtype=torch.float64, pattern=pattern)
    plain = reference(case, inputs, dtype=inputs.q.dtype, pattern=pattern)
    slope = None
    if case.repeated or case.extra_gradients:
        slope = scale_derivative(case, inputs, pattern=pattern, exact=exact)
    return build_expected(exact, plain, slope=slope)


def _run_and_confirm(
    run: Callable[[], tuple[list[Figure], list[Fault]]], *, refused: bool
) -> Findings:
    """Run a probe; repeat it if noise may have caused all of its faults.

    Args:
        run: runs the probe's calls, and returns figures and faults.
        refused: whether the kernel is refused already, whatever this probe finds.
    """
    figures, faults = run()
    first = Findings(figures, [fault.reason for fault in faults], 1, [])
    if not faults or refused or not all(fault.noise_sensitive for fault in faults):
        return first
    for _ in range(REPEATS):
        try:
            figures, faults = run()
        # Kernels may raise anything. The fault that the first run found is more informative.
        except Exception:
            return first
        if faults:
            return first
    # One per probe: the caller refuses a kernel with two of them.
    return Findings(figures, [], 1, first.reasons[:1])


def _run_probe(
    probe: Probe, expected: Expected, references: References
) -> tuple[list[Figure], list[Fault]]:
    """Run the calls of one probe, and return the figures and the faults."""
    case = probe.case
    found = call(probe)
    figures, faults = check_values(probe, found, expected)
    further: list[Iterator[Fault]] = []
    compiled = is_compiled(probe.backend, device=probe.inputs.q.device.type)
    if case.repeated:
        further = [
            _check_repeated_calls(probe, found, expected),
            check_training_conditions(probe, expected),
        ]
    elif case.extra_gradients:
        further = [
            check_precision(probe, found, expected),
            check_full_row(probe, expected, references),
        ]
    elif sum(case.lengths) <= _MAX_EVALUATED and not compiled:
        if case.scores == "flat":  # as in a model whose only adapter is on q
            further = [check_gradients_of(probe, expected, ("dq",))]
        if case.packed:
            further.append(check_without_gradients(probe, expected))
    try:
        for fault in itertools.chain(*further):
            faults.append(fault)
    # Kernels may raise anything. A fault that an earlier call found is more informative.
    except Exception:
        if not faults:
            raise
    return figures, faults


def device_budget(backend: Backend, *, device: str) -> Budget:
    """Return the budget of a backend's probes on this machine's device."""
    if device == "cpu":
        return choose_budget(backend, memory_bytes=None)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return choose_budget(backend, memory_bytes=properties.total_memory)


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
    cases = list_cases(geometry, budget=device_budget(backend, device=device))
    # s2 does not support packed rows.
    packed = geometry.packing and backend.pattern == "full"
    case = next(c for c in cases if c.packed == packed and c.scale_factor != 1)
    probe = Probe(function, backend, case, draw_inputs(case, device=device))
    expected = references.get((backend.pattern, case)) or _compute_expected(probe)

    def repeat() -> tuple[Result, Result]:
        with torch.no_grad():
            evaluated = forward_only(forward(probe))
        return call(probe), evaluated

    def repeat_and_measure() -> int:
        found, _ = repeat()
        results = [found.out, *(g for g in found.gradients.values() if g is not None)]
        return sum(x.numel() * x.itemsize for x in results)

    def repeat_and_check() -> tuple[list[Figure], list[Fault]]:
        faults = [check_further_call(probe, "repeated", found, expected) for found in repeat()]
        return [], list(itertools.chain(*faults))

    with compiling_each_shape(backend, device=device):
        leaking = leaks(repeat_and_measure)
        found = _run_and_confirm(repeat_and_check, refused=False)
    return leaking, found.reasons


def merge(found: Iterable[Findings]) -> Findings:
    """Merge findings: the worst figure of each quantity, the first of each reason."""
    parts = list(found)
    return Findings(
        figures=worst_figures(figure for part in parts for figure in part.figures),
        reasons=_first_of_each([reason for part in parts for reason in part.reasons]),
        cases=sum(part.cases for part in parts),
        unrepeated=[reason for part in parts for reason in part.unrepeated],
        raised=tuple(dict.fromkeys(text for part in parts for text in part.raised)),
    )


def _check_repeated_calls(probe: Probe, first: Result, expected: Expected) -> Iterator[Fault]:
    """Check a repeated call; with packed documents, also one where some of them are changed."""
    case, inputs = probe.case, probe.inputs
    before = [first, call(probe)]
    deterministic = case.geometry.deterministic
    if deterministic or case.packed:
        yield from check_repeated(case, first=first, second=before[1], gradients_too=deterministic)
    # A call that was right once may be wrong when repeated.
    yield from check_values(probe, before[1], expected)[1]
    if not case.packed or first.out.shape != inputs.d_out.shape:
        return
    noise = sum_order_bounds(case, inputs)
    n_documents = len(case.lengths)
    for one in (0, n_documents // 2, n_documents - 1):
        changed = inputs.documents == one
        q, k, v = (
            torch.where(changed[:, None, :, None], -x.flip(-1), x)
            for x in (inputs.q, inputs.k, inputs.v)
        )
        d_out = torch.where(changed[:, :, None, None], -inputs.d_out.flip(-1), inputs.d_out)
        other = probe._replace(inputs=replace(inputs, q=q, k=k, v=v, d_out=d_out))
        after = [call(other)]
        unchanged = ~changed & (inputs.documents >= 0)
        check = partial(check_isolated, case, unchanged=unchanged, noise=noise)
        if any(check(before=before, after=after)):
            # Two calls may agree by chance: more are needed to see whether gradients repeat.
            before += [call(probe) for _ in range(EXTRA_CALLS)]
            after += [call(other) for _ in range(EXTRA_CALLS)]
            yield from check(before=before, after=after)


def _capability(device: str) -> tuple[int, int] | None:
    """Return the compute capability of an NVIDIA GPU."""
    nvidia = device == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability() if nvidia else None


def _first_of_each(reasons: list[Reason]) -> list[Reason]:
    """Return the first reason of each code, in the order of checks.CODE_ORDER."""
    first: dict[str, Reason] = {}
    for reason in reasons:
        first.setdefault(reason.code, reason)
    return sorted(first.values(), key=lambda reason: CODE_ORDER.index(reason.code))

"""Prove one backend on one geometry: every probe, every rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from attnimg.facts import AttentionFunction, Backend, Figure, Geometry, Pattern, Reason
from attnimg.prove.calls import Result, call, reference
from attnimg.prove.cases import Case, cases_of
from attnimg.prove.checks import ORDER, Expected, check_values, expected
from attnimg.prove.company import check_company
from attnimg.prove.dropout import check_dropout
from attnimg.prove.inputs import Inputs, draw
from attnimg.prove.repeats import check_isolated, check_repeated

# The reference of a case serves every backend of a pattern that is proven in the same process.
References = dict[tuple[Pattern, Case], Expected]


class Findings(NamedTuple):
    """What the probes found."""

    figures: list[Figure]
    reasons: list[Reason]
    cases: int


def prove_geometry(
    function: AttentionFunction,
    backend: Backend,
    geometry: Geometry,
    *,
    device: str,
    references: References,
    starting: Callable[[str], None],
) -> Findings:
    """Run every probe of a geometry.

    Args:
        function: the backend's attention.
        backend: what it is judged by.
        geometry: the run's.
        device: "cpu" or "cuda".
        references: filled on the way.
        starting: called with a probe's name before it is run, for what the parent process tells
            when this one dies.

    Raises:
        Exception: whatever a kernel raises.
    """
    figures: list[Figure] = []
    reasons: list[Reason] = []
    cases = cases_of(geometry, device=device)
    if backend.pattern == "shifted":
        # s2 refuses rows that are packed or continue a cache. In rows of up to 8 tokens most see
        # themselves alone: their gradients are rounding, with nothing to measure it by.
        cases = [
            case
            for case in cases
            if not case.packed and case.queries is None and max(case.lengths) > 8
        ]
    for case in cases:
        starting(case.name)
        inputs = draw(case, device=device)
        right = references.get((backend.pattern, case))
        if right is None:
            right = references[backend.pattern, case] = expected(
                *(
                    reference(case, inputs, dtype=dtype, pattern=backend.pattern)
                    for dtype in (torch.float64, inputs.q.dtype)
                )
            )
        try:
            found = call(function, backend, case, inputs)
            new_figures, new_reasons = check_values(backend, case, inputs, found=found, right=right)
            figures += new_figures
            reasons += new_reasons
            if case.repeated:
                reasons += _repeated(function, backend, case, inputs, first=found)
                reasons += check_company(function, backend, case, inputs, right=right)
        # Kernels raise anything. Where an earlier probe found a fault, that says more.
        except Exception:
            if reasons:
                break
            raise
    if geometry.dropout:
        starting("dropout")
        reasons += check_dropout(function, backend, geometry, device=device)
    return Findings(_worst(figures), _first_of_each(reasons), len(cases))


def merge(found: Iterable[Findings]) -> Findings:
    """Join the findings of several geometries: the worst figures, the first of each reason."""
    figures: list[Figure] = []
    reasons: list[Reason] = []
    cases = 0
    for findings in found:
        figures += findings.figures
        reasons += findings.reasons
        cases += findings.cases
    return Findings(_worst(figures), _first_of_each(reasons), cases)


def _repeated(
    function: AttentionFunction, backend: Backend, case: Case, inputs: Inputs, *, first: Result
) -> Iterator[Reason]:
    """Make the call again; where documents are packed, also with some of them changed."""
    again = call(function, backend, case, inputs)
    asked = case.geometry.deterministic
    if asked or case.packed:
        yield from check_repeated(case, first=first, second=again, gradients_too=asked)
    if not case.packed or first.out.shape != inputs.d_out.shape:
        return
    n_documents = len(case.lengths)
    for one in (0, n_documents // 2, n_documents - 1):
        changed = inputs.documents == one
        moved = [torch.where(changed[:, None, :, None], -x.flip(-1), x) for x in _qkv(inputs)]
        d_out = torch.where(changed[:, :, None, None], -inputs.d_out.flip(-1), inputs.d_out)
        other = replace(inputs, **dict(zip("qkv", moved, strict=True)), d_out=d_out)
        after = call(function, backend, case, other)
        yield from check_isolated(
            case, inputs, before=first, again=again, after=after, changed=changed
        )


def _qkv(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return inputs.q, inputs.k, inputs.v


def _worst(figures: list[Figure]) -> list[Figure]:
    """Keep, for each quantity, the figure that comes closest to its bound or is furthest beyond."""
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
    """Keep the first reason of each code, in the order of checks.ORDER."""
    first: dict[str, Reason] = {}
    for reason in reasons:
        first.setdefault(reason.code, reason)
    return sorted(first.values(), key=lambda reason: ORDER.index(reason.code))

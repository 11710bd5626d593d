"""Find plans under which packed documents mix: transformers' mask has no document boundaries."""

from __future__ import annotations

from attnimg.backends import backend_named
from attnimg.facts import Finding, Plan, Problem
from attnimg.select import refused_types


def mixing_error(found: Plan, problem: Problem) -> Finding | None:
    """Return the error of a plan under which packed documents would mix; None where none do."""
    if not problem.packing or problem.model is None or masked_backend(found) is None:
        return None
    return refused_types.mask_refusal(problem.model.type)


def masked_backend(found: Plan) -> str | None:
    """Return the first backend of a plan that separates documents by transformers' mask."""
    if found.chosen is None:
        return None
    names = [choice.verdict.backend for choice in found.groups] or [found.chosen.backend]
    backends = ((name, backend_named(name)) for name in names)
    return next((name for name, backend in backends if backend and backend.mask != "flash"), None)

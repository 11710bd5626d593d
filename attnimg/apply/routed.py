"""A plan with a backend a group of layers, made one backend of: a router between them."""

from __future__ import annotations

import hashlib
from functools import partial

from attnimg.apply.router import Router, shape_of
from attnimg.backends._attend import as_applied, attention_function
from attnimg.facts import AttentionFunction, Backend, GroupChoice, Needs, Plan

ROUTER = "attnimg_router"


def backend_of(plan: Plan) -> Backend:
    """Give the backend that a plan chose, or a router where it chose one a group of layers."""
    assert plan.chosen is not None, "a plan without a choice ends the run before"
    if plan.groups:
        return _router(plan.groups)
    return plan.chosen.backend


def _router(groups: tuple[GroupChoice, ...]) -> Backend:
    names = dict.fromkeys(choice.verdict.backend.name for choice in groups)
    return Backend(
        name=ROUTER,
        rank=0,
        summary=f"a router between {', '.join(names)}",
        packing="native",
        # One name a set of routes: a second model with other layers gets a router of its own.
        applied_as=f"{ROUTER}_{_digest(groups)}",
        load_attend=partial(_load, groups),
        needs=Needs(),
    )


def _digest(groups: tuple[GroupChoice, ...]) -> str:
    """Return a short hash of a set of routes, the same in every process of a run."""
    routes = [(choice.layers, choice.verdict.backend.name) for choice in groups]
    return hashlib.sha256(repr(routes).encode()).hexdigest()[:8]


def _load(groups: tuple[GroupChoice, ...]) -> AttentionFunction:
    functions: dict[str, AttentionFunction] = {}
    backends = {one.verdict.backend.name: one.verdict.backend for one in groups}
    for name, backend in backends.items():
        layers = [one.layers for one in groups if one.verdict.backend.name == name]
        functions[name] = attention_function(as_applied(backend, layers, routed=True))
    return Router({shape_of(one.layers): functions[one.verdict.backend.name] for one in groups})

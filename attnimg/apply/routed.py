"""A plan with a backend a group of layers, made one backend of: a router between them."""

from __future__ import annotations

import hashlib
from functools import partial

from attnimg.apply.router import Router, shape_of
from attnimg.backends import backend_named
from attnimg.backends._transformers import as_applied, attention_function
from attnimg.facts import AttentionFunction, Backend, GroupChoice, Needs, Plan

ROUTER = "attnimg_router"


def backend_of(plan: Plan) -> Backend:
    """Give the backend that a plan chose, or a router where it chose one a group of layers."""
    assert plan.chosen is not None, "a plan without a choice ends the run before"
    if plan.groups:
        return _router(plan.groups)
    found = backend_named(plan.chosen.backend)
    assert found is not None
    return found


def _router(groups: tuple[GroupChoice, ...]) -> Backend:
    names = dict.fromkeys(choice.verdict.backend for choice in groups)
    return Backend(
        name=ROUTER,
        rank=0,
        summary=f"a router between {', '.join(names)}",
        packing="native",
        # One name a set of routes: a second model with other layers gets a router of its own.
        applied_as=f"{ROUTER}_{_digest(groups)}",
        load_function=partial(_load, groups),
        needs=Needs(),
    )


def _digest(groups: tuple[GroupChoice, ...]) -> str:
    """Tell sets of routes apart, the same in every process of a run."""
    return hashlib.sha256(repr(groups).encode()).hexdigest()[:8]


def _load(groups: tuple[GroupChoice, ...]) -> AttentionFunction:
    functions: dict[str, AttentionFunction] = {}
    for name in {choice.verdict.backend for choice in groups}:
        backend = backend_named(name)
        assert backend is not None
        layers = [choice.layers for choice in groups if choice.verdict.backend == name]
        functions[name] = attention_function(as_applied(backend, layers, routed=True))
    return Router({shape_of(choice.layers): functions[choice.verdict.backend] for choice in groups})

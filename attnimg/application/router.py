"""Build a router: an attention function that calls the planned backend for each layer's shape."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from attnimg.backends._transformers import applied_form, attention_function
from attnimg.errors import KernelError, set_backend
from attnimg.facts import AttentionFunction, Backend, Needs
from attnimg.run_facts import GroupChoice, LayerGroup, Plan

ROUTER = "attnimg_router"


class Shape(NamedTuple):
    """The properties of a layer that a call has: head sizes, window, soft cap, sinks."""

    head_dim_qk: int
    head_dim_v: int
    window: int | None
    softcap: float | None
    sinks: bool


class Router:
    """An attention function that selects a backend by the shape of each call.

    Args:
        routes: shape of a group of layers -> the function that it runs.
    """

    def __init__(self, routes: Mapping[Shape, AttentionFunction]) -> None:
        self.routes = dict(routes)
        self._by_call: dict[tuple[Any, ...], AttentionFunction] = {}

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        **arguments: Any,
    ) -> Any:
        """Return the output of attention; see attnimg.backends._transformers.

        Raises:
            AttnimgError: no layer of the plan has this shape.
        """
        get = arguments.get
        call = (
            query.shape[-1],
            value.shape[-1],
            get("sliding_window"),
            get("softcap"),
            get("s_aux") is not None,
        )
        function = self._by_call.get(call)
        if function is None:
            function = self._by_call[call] = self._function_for(Shape(*call))
        return function(module, query, key, value, attention_mask, **arguments)

    def _function_for(self, shape: Shape) -> AttentionFunction:
        if shape in self.routes:
            return self.routes[shape]
        # A model may implement the window in its mask, or the soft cap outside the call. Then the
        # backend is found by the head sizes, if all layers with these sizes run the same one.
        sized = {f for s, f in self.routes.items() if s[:2] == shape[:2] and s.sinks == shape.sinks}
        if len(sized) == 1:
            return sized.pop()
        known = "; ".join(str(tuple(known)) for known in self.routes)
        raise KernelError(
            "a layer of this model has a shape that is not in the plan",
            why=f"found {tuple(shape)} (head_dim, head_dim of v, window, softcap, sinks); "
            f"needed one of {known}",
            do=set_backend("sdpa"),
            code="not-planned",
            exit_code=1,
        )


def call_shape(group: LayerGroup) -> Shape:
    """Return the shape that the calls of a group of layers have."""
    return Shape(
        group.head_dim_qk, group.head_dim_v, group.window, group.softcap or None, group.sinks
    )


def plan_backend(plan: Plan) -> Backend:
    """Return the backend that a plan chose; a router if groups of layers have different ones."""
    assert plan.chosen is not None, "a run ends before this if its plan chose no backend"
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
        # Each set of routes has its own name, so that another model gets its own router.
        applied_as=f"{ROUTER}_{_digest(groups)}",
        load_function=partial(_load, groups),
        needs=Needs(),
    )


def _digest(groups: tuple[GroupChoice, ...]) -> str:
    """Return a hash of a set of routes, the same in every process of a run."""
    routes = [(choice.layers, choice.verdict.backend.name) for choice in groups]
    return hashlib.sha256(repr(routes).encode()).hexdigest()[:8]


def _load(groups: tuple[GroupChoice, ...]) -> AttentionFunction:
    functions: dict[str, AttentionFunction] = {}
    backends = {one.verdict.backend.name: one.verdict.backend for one in groups}
    for name, backend in backends.items():
        layers = [one.layers for one in groups if one.verdict.backend.name == name]
        functions[name] = attention_function(applied_form(backend, layers, routed=True))
    return Router({call_shape(one.layers): functions[one.verdict.backend.name] for one in groups})

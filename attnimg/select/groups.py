"""Choose the best backend for each group of equal layers, where layers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnimg.facts import Backend, GroupChoice, LayerGroup, Machine, Problem
from attnimg.select.classes import reason_against_own
from attnimg.select.judge import judge
from attnimg.select.ranks import ordered


def choose_groups(
    backends: Sequence[Backend], machine: Machine, problem: Problem
) -> tuple[GroupChoice, ...]:
    """Choose a backend for each group of layers.

    Args:
        backends: the candidates, by rank.
        machine: what it runs on.
        problem: what has to be computed.

    Returns:
        One choice a group; empty where every group would run the same, or where one of them would
        run what a router can't call.
    """
    if problem.model is None or len(problem.model.layers) < 2:
        return ()
    if problem.model_class and reason_against_own(problem.model_class, "a router"):
        return ()
    order = ordered(backends, machine, problem, routed=True)
    able = [backend for backend in order if backend.automatic and backend.applied_as is not None]
    choices: list[tuple[LayerGroup, Backend]] = []
    for group in problem.model.layers:
        alone = _alone(problem, group)
        backend = next((b for b in able if judge(b, machine, alone, rank=0).fits), None)
        # A router hands out the padding alone: no block mask, and torch's exact attention has
        # neither soft cap nor sinks.
        if backend is None or backend.mask == "flex":
            return ()
        if backend.mask != "flash" and (group.softcap or group.sinks):
            return ()
        choices.append((group, backend))
    for whole in [backend for _, backend in choices if backend.for_process]:
        choices = [
            (
                group,
                whole if _is_replaced(backend, whole, machine, _alone(problem, group)) else backend,
            )
            for group, backend in choices
        ]
    if len({backend.name for _, backend in choices}) == 1:
        return ()
    return tuple(
        GroupChoice(
            layers=group,
            verdict=judge(backend, machine, _alone(problem, group), rank=order.index(backend) + 1),
        )
        for group, backend in choices
    )


def _alone(problem: Problem, group: LayerGroup) -> Problem:
    assert problem.model is not None
    return replace(problem, model=replace(problem.model, layers=(group,)))


def _is_replaced(backend: Backend, whole: Backend, machine: Machine, alone: Problem) -> bool:
    """Check whether a variable that chooses `whole` would have another backend run its kernel."""
    same_package = backend.needs.packages == whole.needs.packages
    return same_package and judge(whole, machine, alone, rank=0).fits

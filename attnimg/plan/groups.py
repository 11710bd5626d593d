"""Give each group of equal layers the best backend of its own, where layers differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from attnimg.facts import Backend, GroupChoice, Machine, Problem, Verdict
from attnimg.plan.classes import reason_against_own
from attnimg.plan.judge import judge


def choose_groups(
    chosen: Verdict, backends: Sequence[Backend], machine: Machine, problem: Problem
) -> tuple[GroupChoice, ...]:
    """Choose a backend for each group of layers.

    Args:
        chosen: the best that fits all of them.
        backends: the candidates, by rank.
        machine: what it runs on.
        problem: what has to be computed.

    Returns:
        One choice a group; empty where every group would run `chosen`, or where one of them would
        run what a router can't call.
    """
    if problem.model is None or len(problem.model.layers) < 2:
        return ()
    if problem.model_class and reason_against_own(problem.model_class, "a router"):
        return ()
    choices = []
    for group in problem.model.layers:
        alone = replace(problem, model=replace(problem.model, layers=(group,)))
        for place, backend in enumerate(backends, 1):
            if not backend.automatic or backend.applied_as is None:
                continue
            verdict = judge(backend, machine, alone, rank=place)
            if verdict.fits:
                break
        else:
            return ()
        # A router hands out the padding alone: no block mask, and torch's exact attention has
        # neither soft cap nor sinks.
        if backend.mask == "flex" or (backend.mask != "flash" and (group.softcap or group.sinks)):
            return ()
        choices.append(GroupChoice(layers=group, verdict=verdict))
    if all(choice.verdict.backend == chosen.backend for choice in choices):
        return ()
    return tuple(choices)

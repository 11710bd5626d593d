"""Explain in one sentence why a plan chose its backend, for readers who do not see the ranks."""

from __future__ import annotations

from collections.abc import Sequence

from attnimg.backends import backend_named, is_automatic
from attnimg.facts import GroupChoice, LayerGroup, Machine, Plan, Problem, Rank, Verdict
from attnimg.select.ranks import place_of

# Reasons that lie in the model's attention: the backend runs here, and not these layers.
_OF_LAYERS = frozenset(
    {"head-dim", "head-dim-v", "window", "softcap", "sinks", "dropout", "model-class"}
)


def automatic_because(plan: Plan, machine: Machine, problem: Problem) -> str:
    """Return why `auto` chose its backend: how many fit, why this one, why no better-ranked one.

    Args:
        plan: one with a choice.
        machine: what it runs on.
        problem: what has to be computed.
    """
    assert plan.chosen is not None
    fitting = [verdict for verdict in plan.verdicts if verdict.fits]
    able = [verdict for verdict in fitting if is_automatic(verdict.backend)]
    words = ["compiled"] * problem.compiled + ["packed"] * problem.packing
    run = f"{' '.join([*words, 'training'])} on {machine.arch.name}"
    count = f"{len(able)} of {len(plan.verdicts)} backends fit {run}"
    by_name = [verdict.backend for verdict in fitting if verdict not in able]
    if by_name:
        count += f" ({', '.join(by_name)}: only when the config names it)"
    chosen = plan.chosen.backend
    if len(able) == 1:
        return f"{count.replace(' fit ', ' fits ')}: {chosen}"
    parts = [f"{count}; {chosen} has the best rank of them"]
    place = _place(plan.chosen, machine, problem)
    if place.rank <= _general(plan.chosen):
        parts[0] += f": it {place.why} [{place.source}]"
    for verdict in able[1:]:
        behind = _place(verdict, machine, problem)
        if behind.rank > _general(verdict) < _general(plan.chosen):
            parts.append(f"{verdict.backend} {behind.why} [{behind.source}]")
    better: dict[str, list[str]] = {}
    for verdict in plan.verdicts[: plan.verdicts.index(plan.chosen)]:
        if is_automatic(verdict.backend) and {r.code for r in verdict.reasons} <= _OF_LAYERS:
            better.setdefault(verdict.reasons[0].text, []).append(verdict.backend)
    parts += [
        f"{', '.join(names)} {'ranks' if len(names) == 1 else 'rank'} better, but: {reason}"
        for reason, names in better.items()
    ]
    return "; ".join(parts)


def family_because(asked: Verdict, taken: Verdict) -> str:
    """Return why a member of the flash family was taken where one was asked for by name."""
    rule = (
        f"attn_implementation: {asked.backend} asks for the flash family, whose order is 4, 3, 2 "
        "until this GPU is timed"
    )
    if taken.backend == asked.backend:
        return f"{rule}; it is the first of them that fits"
    if asked.fits:
        return f"{rule}; {taken.backend} is the first of them that fits"
    reason = asked.reasons[0].text
    return (
        f"{rule}; {asked.backend} does not fit ({reason}), {taken.backend} is the first that does"
    )


def groups_because(groups: Sequence[GroupChoice], chosen: Verdict) -> str:
    """Return why layers of different shape run different backends."""
    parts = [f"{layers_text(choice.layers)} run {choice.verdict.backend}" for choice in groups]
    return (
        "its layers differ, and each group runs the best backend that fits it: "
        f"{'; '.join(parts)}; "
        f"the best one for all layers would be {chosen.backend}"
    )


def layers_text(group: LayerGroup) -> str:
    """Name a group of layers by what sets it apart."""
    text = f"{group.count} layers of head_dim {group.head_dim_qk}"
    if group.head_dim_v != group.head_dim_qk:
        text += f" (v {group.head_dim_v})"
    extras = [
        f"window {group.window}" if group.window else "",
        f"soft cap {group.softcap:g}" if group.softcap else "",
        "sinks" if group.sinks else "",
    ]
    if extras := list(filter(None, extras)):
        text += f" with {' and '.join(extras)}"
    return text


def _place(verdict: Verdict, machine: Machine, problem: Problem) -> Rank:
    backend = backend_named(verdict.backend)
    assert backend is not None
    return place_of(backend, machine, problem)


def _general(verdict: Verdict) -> int:
    backend = backend_named(verdict.backend)
    assert backend is not None
    return backend.rank

"""Order the candidates for a machine and a run, by what their own files say of their places.

Until timings of this GPU replace them, ranks are facts with a source: Backend.rank in general, and
Backend.ranks where a situation says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable

from attnimg.facts import Backend, Machine, Problem, Rank


def ordered(
    backends: Iterable[Backend], machine: Machine, problem: Problem, *, routed: bool = False
) -> list[Backend]:
    """Return the candidates in the order in which `auto` tries them.

    Args:
        backends: the candidates.
        machine: what they run on.
        problem: what has to be computed.
        routed: whether a router calls each for its own layers, document by document.
    """
    return sorted(
        backends,
        key=lambda backend: place_of(backend, machine, problem, routed=routed).rank,
    )


def place_of(backend: Backend, machine: Machine, problem: Problem, *, routed: bool = False) -> Rank:
    """Return a backend's place: the first of its particular ones that holds, or its general one."""
    for rank in backend.ranks:
        if _holds(rank, machine, problem, routed=routed):
            return rank
    return Rank(rank=backend.rank, why=backend.rank_why, source=backend.rank_source)


def _holds(rank: Rank, machine: Machine, problem: Problem, *, routed: bool) -> bool:
    if rank.archs and machine.arch.name not in rank.archs:
        return False
    if rank.packed not in (None, problem.packing) or rank.compiled not in (None, problem.compiled):
        return False
    if rank.routed not in (None, routed):
        return False
    if rank.head_dim is None:
        return True
    low, high = rank.head_dim
    layers = problem.model.layers if problem.model else ()
    return any(low <= layer.head_dim_qk <= high for layer in layers)

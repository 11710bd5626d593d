"""Choose a backend: judge every candidate on plain values, then take the best that fits.

Pure: no GPU, file, clock or environment is read here. All comes in as arguments.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from attnimg.backends import all_backends, backend_named, is_automatic
from attnimg.facts import Arch, Backend, DType, Machine, Plan, Problem, Reason, Verdict
from attnimg.select.because import automatic_because, family_because, groups_because
from attnimg.select.groups import choose_groups
from attnimg.select.judge import judge
from attnimg.select.masks import masked_backend, mixing_error
from attnimg.select.memory import Quadratic, memory_warning, quadratic_memory
from attnimg.select.ranks import ordered

__all__ = [
    "Quadratic",
    "choose",
    "memory_warning",
    "mixing_error",
    "plan_dict",
    "quadratic_memory",
    "training_dtype",
    "without",
]

AUTO = "auto"
# Reasons that lie in the GPU itself. A flash member that was asked for by name and has one of them
# is refused; the others of its family stand in for it only where a head size is the obstacle.
_ARCH_CODES = frozenset(backend.needs.arch_code for backend in all_backends())


def training_dtype(*, bf16: bool | str, fp16: bool, arch: Arch) -> DType:
    """Choose the precision of a run.

    Args:
        bf16: the config's value: true, false, "auto" or "full".
        fp16: the config's value. On a CPU the run is fp32 all the same: accelerate neither casts
            nor scales there, and would say so to nobody.
            Source: accelerate/accelerator.py:565-569, 1.12 (2026-11-26).
        arch: what it runs on. Below sm_80 there is no bf16 arithmetic, so "auto" is fp16 there;
            on a CPU "auto" is fp32, which is faster than an emulated bf16.
    """
    if fp16:
        return "float32" if arch.vendor == "cpu" else "float16"
    if bf16 != "auto":
        return "bfloat16" if bf16 else "float32"
    if arch.vendor == "cpu":
        return "float32"
    return "bfloat16" if arch.capability is None or arch.capability >= (8, 0) else "float16"


def choose(asked: str | None, machine: Machine, problem: Problem, *, strict: bool = False) -> Plan:
    """Judge every candidate and choose one.

    Args:
        asked: attn_implementation; None and "auto" leave the choice to the ranks.
        machine: what it runs on.
        problem: what has to be computed.
        strict: take exactly what was asked, also within the flash family.

    Returns:
        The plan. Its `chosen` is None when what was asked does not fit, or nothing does.
    """
    asked = asked or AUTO
    backends = list(all_backends())
    if (named := backend_named(asked)) is not None and named not in backends:
        backends.append(named)
    backends = ordered(backends, machine, problem)
    if named is not None and named.family:
        backends = _in_family_order(backends, named.family)
    verdicts = tuple(
        judge(backend, machine, problem, rank=place) for place, backend in enumerate(backends, 1)
    )
    if named is None:
        found = _automatic(verdicts)
        if found.chosen is None:
            return found
        if (following := _with_boundaries(found, problem)) is not found:
            return following
        said = automatic_because(found, machine, problem)
        groups = choose_groups(backends, machine, problem)
        if groups:
            return replace(found, groups=groups, because=groups_because(groups, found.chosen))
        return replace(found, because=said)
    return replace(_explicit(named, verdicts, strict=strict), strict=strict)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan with every candidate and all reasons, as `explain --json` prints it."""
    chosen = plan.chosen
    return {
        "asked": plan.asked,
        "because": plan.because,
        "candidates": [
            {
                "backend": verdict.backend,
                "fits": verdict.fits,
                "rank": verdict.rank,
                "reasons": [asdict(reason) for reason in verdict.reasons],
            }
            for verdict in plan.verdicts
        ],
        "chosen": chosen
        and {"backend": chosen.backend, "kernel": chosen.kernel, "because": plan.because},
        "groups": [
            {
                "layers": asdict(choice.layers),
                "backend": choice.verdict.backend,
                "kernel": choice.verdict.kernel,
            }
            for choice in plan.groups
        ],
    }


def _with_boundaries(found: Plan, problem: Problem) -> Plan:
    """Return the plan with the best backend that isolates documents; the same plan without one."""
    following = found
    while (against := mixing_error(following, problem)) is not None:
        name = masked_backend(following)
        assert name is not None
        reason = Reason(code=against.code, text=against.why.splitlines()[0])
        following = without(following, name, reason)
    return following if following.chosen is not None else found


def without(plan: Plan, backend: str, reason: Reason) -> Plan:
    """Return the plan that remains when a proof ruled a backend out.

    Where groups of layers ran different ones, all of them run the best for all from then on.
    An automatic choice goes on to the next candidate, and the flash family to its next member. Any
    other backend that was asked for by name is never swapped.
    """
    verdicts = tuple(
        Verdict(backend=v.backend, rank=v.rank, reasons=(*v.reasons, reason))
        if v.backend == backend
        else v
        for v in plan.verdicts
    )
    if plan.groups and backend not in {v.backend for v in plan.verdicts}:
        because = f"its layers could not run different backends: {reason.text}"
        return replace(plan, groups=(), because=because)
    named = backend_named(plan.asked)
    if named is not None and named.family and not plan.strict:
        return _explicit(named, verdicts, strict=False)
    if plan.asked != AUTO:
        do = "set attn_implementation: auto, which tries the next one"
        why = f"{backend}: {reason.text}"
        return replace(plan, chosen=None, because=why, verdicts=verdicts, do=do)
    return _automatic(verdicts)


def _automatic(verdicts: tuple[Verdict, ...]) -> Plan:
    able = [verdict for verdict in verdicts if verdict.fits and is_automatic(verdict.backend)]
    if not able:
        because = "no attention backend fits"
        if dtype := _dtype_reason(verdicts):
            because += f"; eager, which takes every model: {dtype}"
        do = _nothing_fits_do(verdicts)
        return Plan(asked=AUTO, chosen=None, because=because, verdicts=verdicts, do=do)
    because = f"{able[0].backend} has the best rank of the backends that still fit"
    return Plan(asked=AUTO, chosen=able[0], because=because, verdicts=verdicts)


def _explicit(named: Backend, verdicts: tuple[Verdict, ...], *, strict: bool) -> Plan:
    by_name = {verdict.backend: verdict for verdict in verdicts}
    asked = by_name[named.name]
    # flash_attention_4 asks for itself; 2 and 3 ask for the best of the family.
    stands_in = named.uses_flash_lib and named.family is not None and not strict
    arch_fails = any(reason.code in _ARCH_CODES for reason in asked.reasons)
    if stands_in and not arch_fails:
        members = {b.name for b in all_backends() if b.family == named.family and b.applied_as}
        for verdict in verdicts:
            if verdict.backend in members and verdict.fits:
                because = family_because(asked, verdict)
                return Plan(asked=named.name, chosen=verdict, because=because, verdicts=verdicts)
    if asked.fits and named.applied_as:
        because = "the config names it, and it fits"
        return Plan(asked=named.name, chosen=asked, because=because, verdicts=verdicts)
    because = "; ".join(reason.text for reason in asked.reasons)
    if asked.fits:
        because = "it would fit, but this version of attnimg cannot apply it yet"
    others = [v.backend for v in verdicts if v.fits and is_automatic(v.backend)]
    do = f"set attn_implementation: {others[0]}, which fits" if others else ""
    do = do or _nothing_fits_do(verdicts)
    return Plan(asked=named.name, chosen=None, because=because, verdicts=verdicts, do=do)


def _nothing_fits_do(verdicts: tuple[Verdict, ...]) -> str:
    """Return what to do where no backend fits: change the precision, where that is why."""
    if _dtype_reason(verdicts):
        return "set bf16: auto, which takes the precision that the GPU has"
    return "see the reasons against each backend, which attnimg explain prints"


def _dtype_reason(verdicts: tuple[Verdict, ...]) -> str:
    """Return why eager does not take the precision of the run; "" where it does."""
    reasons = [r for v in verdicts if v.backend == "eager" for r in v.reasons if r.code == "dtype"]
    return reasons[0].text if reasons else ""


def _in_family_order(backends: list[Backend], family: str) -> list[Backend]:
    """Return the candidates with a family's members in the contract's order among themselves.

    That order, 4, 3, 2, is the one of their general ranks. `auto` goes by architecture; a name asks
    for this one until timings replace it: recorded ones of this GPU (docs/gpu-runs) count where
    torch, the kernel and Python are the image's.
    """
    members = iter([backend for backend in all_backends() if backend.family == family])
    return [next(members) if backend.family == family else backend for backend in backends]

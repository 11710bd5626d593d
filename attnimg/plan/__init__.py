"""Choose a backend: judge every candidate on plain values, then take the best that fits.

Pure: no GPU, file, clock or environment is read here. All comes in as arguments.
"""

from __future__ import annotations

from dataclasses import replace

from attnimg.backends import all_backends, backend_named
from attnimg.facts import Arch, Backend, DType, Machine, Plan, Problem, Reason, Verdict
from attnimg.plan.groups import choose_groups
from attnimg.plan.judge import judge

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
        backends = sorted([*backends, named], key=lambda backend: backend.rank)
    verdicts = tuple(
        judge(backend, machine, problem, rank=place) for place, backend in enumerate(backends, 1)
    )
    if named is None:
        found = _automatic(verdicts, backends)
        groups = found.chosen and choose_groups(found.chosen, backends, machine, problem)
        if groups:
            because = f"{found.because}; groups of layers that have a better one run that"
            found = replace(found, groups=groups, because=because)
        return found
    return replace(_explicit(named, verdicts, backends, strict=strict), strict=strict)


def without(plan: Plan, backend: str, reason: Reason) -> Plan:
    """Give the plan that remains when a proof ruled a backend out.

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
        return _explicit(named, verdicts, list(all_backends()), strict=False)
    if plan.asked != AUTO:
        do = "set attn_implementation: auto, which tries the next one"
        why = f"{backend}: {reason.text}"
        return replace(plan, chosen=None, because=why, verdicts=verdicts, do=do)
    return _automatic(verdicts, list(all_backends()))


def _automatic(verdicts: tuple[Verdict, ...], backends: list[Backend]) -> Plan:
    able = {b.name for b in backends if b.automatic and b.applied_as}
    fitting = [v for v in verdicts if v.fits and v.backend in able]
    if not fitting:
        do = "see the reasons above; attn_implementation: eager takes everything"
        because = "no attention backend fits"
        return Plan(asked=AUTO, chosen=None, because=because, verdicts=verdicts, do=do)
    asked_alone = [v.backend for v in verdicts if v.fits and v.backend not in able]
    fit = f"fit and auto takes ({', '.join(asked_alone)}: by name only)" if asked_alone else "fit"
    because = f"it ranks first of the {len(fitting)} that {fit}"
    if len(fitting) == 1:
        because = f"it is the only one that {fit.replace('fit', 'fits', 1)}"
    return Plan(asked=AUTO, chosen=fitting[0], because=because, verdicts=verdicts)


def _explicit(
    named: Backend, verdicts: tuple[Verdict, ...], backends: list[Backend], *, strict: bool
) -> Plan:
    by_name = {verdict.backend: verdict for verdict in verdicts}
    asked = by_name[named.name]
    family = {b.name for b in backends if b.family and b.family == named.family and b.applied_as}
    # flash_attention_4 asks for itself; 2 and 3 ask for the best of the family.
    stands_in = named.uses_flash_lib and bool(family) and not strict
    arch_fails = any(reason.code in _ARCH_CODES for reason in asked.reasons)
    if stands_in and not arch_fails:
        for verdict in verdicts:
            if verdict.backend in family and verdict.fits:
                because = _family_because(asked, verdict)
                return Plan(asked=named.name, chosen=verdict, because=because, verdicts=verdicts)
    if asked.fits and named.applied_as:
        because = "it was asked for, and nothing speaks against it"
        return Plan(asked=named.name, chosen=asked, because=because, verdicts=verdicts)
    because = "; ".join(reason.text for reason in asked.reasons)
    if asked.fits:
        because = "it would fit, but this version of attnimg cannot apply it yet"
    others = [
        v.backend
        for v in verdicts
        if v.fits
        and _by_name(backends, v.backend).automatic
        and _by_name(backends, v.backend).applied_as
    ]
    do = f"set attn_implementation: {others[0]}, which fits" if others else "nothing fits here"
    return Plan(asked=named.name, chosen=None, because=because, verdicts=verdicts, do=do)


def _family_because(asked: Verdict, taken: Verdict) -> str:
    if taken.backend == asked.backend:
        return "it was asked for, and is the best of the flash family that fits"
    if asked.fits:
        return f"{asked.backend} asks for the flash family, and this is its best that fits"
    return f"{asked.backend} does not fit: {asked.reasons[0].text}"


def _by_name(backends: list[Backend], name: str) -> Backend:
    return next(backend for backend in backends if backend.name == name)

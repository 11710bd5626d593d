"""Choose a backend: check every candidate, then take the best-ranked one that fits.

Candidates are ordered by the ranks in their files: Backend.ranks in particular situations,
Backend.rank otherwise, each with a source. Timings on this GPU will replace them. Where layers
differ, each group of equal layers may get its own backend.

All functions are pure: they do not read the GPU, files, the clock or the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from attnimg.backends import all_backends, find_backend
from attnimg.facts import (
    Arch,
    Backend,
    DType,
    Finding,
    GroupChoice,
    LayerGroup,
    Machine,
    Plan,
    Problem,
    Rank,
    Reason,
    Verdict,
)
from attnimg.select.judge import judge, reason_against_own
from attnimg.select.model_types import mask_refusal

AUTO = "auto"
# Codes of reasons about the GPU. A flash backend that the config names is refused for such a
# reason; for other reasons, such as an unsupported head size, a member of its family replaces it.
_ARCH_CODES = frozenset(backend.needs.arch_code for backend in all_backends())
# Codes of reasons about the model's layers: the backend runs here, but does not support them.
_LAYER_CODES = frozenset(
    {"head-dim", "head-dim-v", "window", "softcap", "sinks", "dropout", "model-class"}
)


def training_dtype(*, bf16: bool | str, fp16: bool, arch: Arch) -> DType:
    """Return the precision of a run.

    Args:
        bf16: the config's value: true, false, "auto" or "full".
        fp16: the config's value. On a CPU the run is fp32 even so: accelerate silently neither
            casts nor scales there.
            Source: accelerate/accelerator.py:565-569, 1.12 (2026-11-26).
        arch: the architecture. "auto" is fp16 below sm_80, which has no bf16 arithmetic, and fp32
            on a CPU, where it is faster than emulated bf16.
    """
    if fp16:
        return "float32" if arch.vendor == "cpu" else "float16"
    if bf16 != "auto":
        return "bfloat16" if bf16 else "float32"
    if arch.vendor == "cpu":
        return "float32"
    return "bfloat16" if arch.capability is None or arch.capability >= (8, 0) else "float16"


def choose(asked: str | None, machine: Machine, problem: Problem, *, strict: bool = False) -> Plan:
    """Check every candidate and choose one.

    Args:
        asked: attn_implementation; for None and "auto" the ranks decide.
        machine: the machine of the run.
        problem: what attention has to compute.
        strict: use exactly the requested backend, also within the flash family.

    Returns:
        The plan. Its `chosen` is None when the requested backend, or every backend, does not fit.
    """
    named = find_backend(asked or AUTO)
    backends = list(all_backends())
    if named is not None and named not in backends:
        backends.append(named)
    backends = _ordered(backends, machine, problem)
    if named is not None and named.family:
        backends = _in_family_order(backends, named.family)
    verdicts = tuple(
        judge(backend, machine, problem, rank=place) for place, backend in enumerate(backends, 1)
    )
    if named is not None:
        return replace(_explicit(named, verdicts, strict=strict), strict=strict)
    found = _automatic(verdicts)
    if found.chosen is None:
        return found
    if (isolating := _with_boundaries(found, problem)) is not found:
        return isolating
    if groups := _choose_groups(backends, machine, problem):
        return replace(found, groups=groups, because=_groups_because(groups, found.chosen))
    return replace(found, because=_automatic_because(found, found.chosen, machine, problem))


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan with all candidates and reasons as a dict, as `explain --json` prints it."""
    chosen = plan.chosen
    return {
        "asked": plan.asked,
        "because": plan.because,
        "candidates": [
            {
                "backend": verdict.backend.name,
                "fits": verdict.fits,
                "rank": verdict.rank,
                "reasons": [asdict(reason) for reason in verdict.reasons],
            }
            for verdict in plan.verdicts
        ],
        "chosen": chosen
        and {"backend": chosen.backend.name, "kernel": chosen.kernel, "because": plan.because},
        "groups": [
            {
                "layers": asdict(choice.layers),
                "backend": choice.verdict.backend.name,
                "kernel": choice.verdict.kernel,
            }
            for choice in plan.groups
        ],
    }


def without(plan: Plan, backend: str, reason: Reason) -> Plan:
    """Return the plan after a proof has ruled a backend out.

    If groups of layers had different backends, all of them get the best one for all layers. `auto`
    chooses the next candidate, and the flash family its next member. Any other backend that the
    config names is never replaced.
    """
    if plan.groups and backend not in {v.backend.name for v in plan.verdicts}:
        because = f"its layers could not run different backends: {reason.text}"
        return replace(plan, groups=(), because=because)
    verdicts = tuple(
        replace(v, reasons=(*v.reasons, reason), kernel=None) if v.backend.name == backend else v
        for v in plan.verdicts
    )
    named = find_backend(plan.asked)
    if named is not None and named.family and not plan.strict:
        return _explicit(named, verdicts, strict=False)
    if plan.asked != AUTO:
        do = "set attn_implementation: auto, which tries the next one"
        why = f"{backend}: {reason.text}"
        return replace(plan, chosen=None, because=why, verdicts=verdicts, do=do)
    return _automatic(verdicts)


def mixing_error(plan: Plan, problem: Problem) -> Finding | None:
    """Return the error for a plan with which packed documents would mix; None if they would not.

    They mix if the backend isolates documents by transformers' mask, and the mask of the model's
    type has no document boundaries.
    """
    if not problem.packing or problem.model is None or _masked_backend(plan) is None:
        return None
    return mask_refusal(problem.model.type)


def _masked_backend(plan: Plan) -> Backend | None:
    """Return the first backend of a plan that isolates documents by transformers' mask."""
    verdicts = [choice.verdict for choice in plan.groups] or ([plan.chosen] if plan.chosen else [])
    return next((v.backend for v in verdicts if v.backend.mask != "flash"), None)


def _with_boundaries(found: Plan, problem: Problem) -> Plan:
    """Return the plan with the best backend that isolates documents; the same plan without one."""
    following = found
    while (against := mixing_error(following, problem)) is not None:
        masked = _masked_backend(following)
        assert masked is not None
        reason = Reason(code=against.code, text=against.why.splitlines()[0])
        following = without(following, masked.name, reason)
    return following if following.chosen is not None else found


def _automatic(verdicts: tuple[Verdict, ...]) -> Plan:
    if not (able := _able(verdicts)):
        because = "no attention backend fits"
        if dtype := _dtype_reason(verdicts):
            because += f"; eager, which takes every model: {dtype}"
        do = _nothing_fits_do(verdicts)
        return Plan(asked=AUTO, chosen=None, because=because, verdicts=verdicts, do=do)
    because = f"{able[0].backend.name} has the best rank of the backends that still fit"
    return Plan(asked=AUTO, chosen=able[0], because=because, verdicts=verdicts)


def _explicit(named: Backend, verdicts: tuple[Verdict, ...], *, strict: bool) -> Plan:
    asked = next(verdict for verdict in verdicts if verdict.backend.name == named.name)
    # flash_attention_4 means exactly that; 2 and 3 mean the best member of the family.
    stands_in = named.uses_flash_lib and named.family is not None and not strict
    if stands_in and not any(reason.code in _ARCH_CODES for reason in asked.reasons):
        for verdict in verdicts:
            member = verdict.backend.family == named.family and verdict.backend.applied_as
            if member and verdict.fits:
                because = _family_because(asked, verdict)
                return Plan(asked=named.name, chosen=verdict, because=because, verdicts=verdicts)
    if asked.fits and named.applied_as:
        because = "the config names it, and it fits"
        return Plan(asked=named.name, chosen=asked, because=because, verdicts=verdicts)
    because = "; ".join(reason.text for reason in asked.reasons)
    if asked.fits:
        because = "it would fit, but this version of attnimg cannot apply it yet"
    do = _nothing_fits_do(verdicts)
    if others := _able(verdicts):
        do = f"set attn_implementation: {others[0].backend.name}, which fits"
    return Plan(asked=named.name, chosen=None, because=because, verdicts=verdicts, do=do)


def _able(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return those that fit and that `auto` may choose."""
    return [verdict for verdict in verdicts if verdict.fits and _is_automatic(verdict.backend)]


def _is_automatic(backend: Backend) -> bool:
    return backend.automatic and backend.applied_as is not None


def _nothing_fits_do(verdicts: tuple[Verdict, ...]) -> str:
    """Return what to do if no backend fits: change the precision, if that is the reason."""
    if _dtype_reason(verdicts):
        return "set bf16: auto, which takes the precision that the GPU has"
    return "see the reasons against each backend, which attnimg explain prints"


def _dtype_reason(verdicts: tuple[Verdict, ...]) -> str:
    """Return why eager does not support the precision of the run; "" if it does."""
    reasons = (reason for v in verdicts if v.backend.name == "eager" for reason in v.reasons)
    return next((reason.text for reason in reasons if reason.code == "dtype"), "")


def _in_family_order(backends: list[Backend], family: str) -> list[Backend]:
    """Return the candidates, with the members of a family ordered by their general ranks: 4, 3, 2.

    This order is used if the config names a member of the family; `auto` uses the ranks for the
    architecture. Timings will replace it: those in docs/gpu-runs for the same GPU and for the
    image's versions of torch, the kernel and Python.
    """
    members = iter([backend for backend in all_backends() if backend.family == family])
    return [next(members) if backend.family == family else backend for backend in backends]


def _ordered(
    backends: Iterable[Backend], machine: Machine, problem: Problem, *, routed: bool = False
) -> list[Backend]:
    """Return the candidates in the order in which `auto` tries them; see place_of."""
    return sorted(backends, key=lambda b: place_of(b, machine, problem, routed=routed).rank)


def place_of(backend: Backend, machine: Machine, problem: Problem, *, routed: bool = False) -> Rank:
    """Return a backend's rank: the first of Backend.ranks that applies, or the general rank.

    Args:
        backend: the candidate.
        machine: the machine of the run.
        problem: what attention has to compute.
        routed: whether a router calls it for its layers, one document at a time.
    """
    sizes = [layer.head_dim_qk for layer in problem.model.layers] if problem.model else []
    for rank in backend.ranks:
        low, high = rank.head_dim or (0, 0)
        if (
            (not rank.archs or machine.arch.name in rank.archs)
            and rank.packed in (None, problem.packing)
            and rank.compiled in (None, problem.compiled)
            and rank.routed in (None, routed)
            and (rank.head_dim is None or any(low <= size <= high for size in sizes))
        ):
            return rank
    return Rank(rank=backend.rank, why=backend.rank_why, source=backend.rank_source)


def _choose_groups(
    backends: Sequence[Backend], machine: Machine, problem: Problem
) -> tuple[GroupChoice, ...]:
    """Choose a backend for each group of equal layers, where layers differ.

    Returns:
        One choice per group; empty if all groups would run the same backend, or if one of them
        would run a backend that a router can't call.
    """
    if problem.model is None or len(problem.model.layers) < 2:
        return ()
    if problem.model_class and reason_against_own(problem.model_class, "a router"):
        return ()
    order = _ordered(backends, machine, problem, routed=True)
    choices: list[tuple[LayerGroup, Problem, Backend]] = []
    for group in problem.model.layers:
        alone = replace(problem, model=replace(problem.model, layers=(group,)))
        fitting = (b for b in order if _is_automatic(b) and judge(b, machine, alone, rank=0).fits)
        backend = next(fitting, None)
        # A router passes only the padding mask, so flex_attention would get no block mask; and
        # torch's exact attention has neither soft cap nor sinks.
        if backend is None or backend.mask == "flex":
            return ()
        if backend.mask != "flash" and (group.softcap or group.sinks):
            return ()
        choices.append((group, alone, backend))
    # A variable that selects such a backend also affects layers of other backends of its package.
    for whole in [backend for _, _, backend in choices if backend.for_process]:
        choices = [
            (group, alone, whole)
            if backend.needs.packages == whole.needs.packages
            and judge(whole, machine, alone, rank=0).fits
            else (group, alone, backend)
            for group, alone, backend in choices
        ]
    if len({backend.name for _, _, backend in choices}) == 1:
        return ()
    return tuple(
        GroupChoice(
            layers=group, verdict=judge(backend, machine, alone, rank=order.index(backend) + 1)
        )
        for group, alone, backend in choices
    )


def _automatic_because(plan: Plan, chosen: Verdict, machine: Machine, problem: Problem) -> str:
    """Return in one sentence why `auto` chose its backend.

    It says how many backends fit, why this one has the best rank, and why better-ranked ones were
    not chosen.
    """
    able, name = _able(plan.verdicts), chosen.backend.name
    words = ["compiled"] * problem.compiled + ["packed"] * problem.packing
    run = f"{' '.join([*words, 'training'])} on {machine.arch.name}"
    fit = "fits" if len(able) == 1 else "fit"
    count = f"{len(able)} of {len(plan.verdicts)} backends {fit} {run}"
    by_name = [v.backend.name for v in plan.verdicts if v.fits and v not in able]
    if by_name:
        count += f" ({', '.join(by_name)}: only when the config names it)"
    if len(able) == 1:
        return f"{count}: {name}"
    parts = [f"{count}; {name} has the best rank of them"]
    general = chosen.backend.rank
    place = place_of(chosen.backend, machine, problem)
    if place.rank <= general:
        parts[0] += f": it {place.why} [{place.source}]"
    for backend in (verdict.backend for verdict in able[1:]):
        behind = place_of(backend, machine, problem)
        if behind.rank > backend.rank < general:
            parts.append(f"{backend.name} {behind.why} [{behind.source}]")
    better: dict[str, list[str]] = {}
    for verdict in plan.verdicts[: plan.verdicts.index(chosen)]:
        codes = {reason.code for reason in verdict.reasons}
        if _is_automatic(verdict.backend) and codes <= _LAYER_CODES:
            better.setdefault(verdict.reasons[0].text, []).append(verdict.backend.name)
    parts += [
        f"{', '.join(names)} {'ranks' if len(names) == 1 else 'rank'} better, but: {reason}"
        for reason, names in better.items()
    ]
    return "; ".join(parts)


def _family_because(asked: Verdict, taken: Verdict) -> str:
    """Return why a member of the flash family was chosen when the config names a member."""
    wanted, name = asked.backend.name, taken.backend.name
    rule = (
        f"attn_implementation: {wanted} asks for the flash family, whose order is 4, 3, 2 "
        "until this GPU is timed"
    )
    if asked.fits:
        return f"{rule}; {'it' if wanted == name else name} is the first of them that fits"
    reason = asked.reasons[0].text
    return f"{rule}; {wanted} does not fit ({reason}), {name} is the first that does"


def _groups_because(groups: Sequence[GroupChoice], chosen: Verdict) -> str:
    """Return why groups of layers run different backends."""
    parts = [f"{_layers_text(one.layers)} run {one.verdict.backend.name}" for one in groups]
    return (
        "its layers differ, and each group runs the best backend that fits it: "
        f"{'; '.join(parts)}; the best one for all layers would be {chosen.backend.name}"
    )


def _layers_text(group: LayerGroup) -> str:
    """Return a description of a group of layers: its head_dim, and its features if it has any."""
    text = f"{group.count} layers of head_dim {group.head_dim_qk}"
    if group.head_dim_v != group.head_dim_qk:
        text += f" (v {group.head_dim_v})"
    extras = [
        f"window {group.window}" if group.window else "",
        f"soft cap {group.softcap:g}" if group.softcap else "",
        "sinks" if group.sinks else "",
    ]
    return f"{text} with {' and '.join(filter(None, extras))}" if any(extras) else text

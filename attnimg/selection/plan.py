"""Choose a backend: check every candidate, then take the best-ranked one that fits.

Candidates are ordered by the ranks in their files, each with a source: the first of Backend.ranks
that applies to the run, or else Backend.rank. Timings are not used yet. Where layers differ, each
group of equal layers may get its own backend.

All functions are pure: they do not read the GPU, files, the clock or the environment.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from attnimg.backends import all_backends, find_backend
from attnimg.config.attention import VARIABLE, name_errors
from attnimg.errors import AttnimgError, counted, set_backend
from attnimg.facts import Arch, Backend, DType, Finding, LayerKind, Machine, Rank, RequestedBy
from attnimg.run_facts import GroupChoice, LayerGroup, Plan, Problem, Reason, Verdict
from attnimg.selection.judge import judge, reason_against_registered
from attnimg.selection.model_types import mask_refusal

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


def choose(
    requested: str | None,
    machine: Machine,
    problem: Problem,
    *,
    strict: bool = False,
    kinds: Mapping[LayerKind, str] | None = None,
) -> Plan:
    """Check every candidate and choose one.

    Args:
        requested: the name in the config; for None and "auto" the ranks decide, unless the
            machine's variables have ATTNIMG_BACKEND.
        machine: the machine of the run.
        problem: what attention has to compute.
        strict: whether no other member of the flash family may replace the requested backend.
        kinds: the config's attn_backends: kind of layers -> backend; only if `requested` is "auto".

    Returns:
        The plan. Its `chosen` is None when the requested backend, or every backend, does not fit.

    Raises:
        AttnimgError: ATTNIMG_BACKEND does not name a backend.
    """
    by: RequestedBy = "config"
    if requested in (None, AUTO) and not kinds and (variable := machine.variables.get(VARIABLE)):
        _require_backend_name(variable)
        requested, by = variable, VARIABLE
    named = find_backend(requested or AUTO)
    backends = list(all_backends())
    if named is not None and named not in backends:
        backends.append(named)
    backends = _sort_by_rank(backends, machine, problem)
    if named is not None and named.family:
        backends = _sort_family(backends, named.family)
    verdicts = tuple(
        judge(backend, machine, problem, rank=rank) for rank, backend in enumerate(backends, 1)
    )
    if named is not None:
        return replace(_plan_for(named, verdicts, strict=strict, by=by), strict=strict)
    if kinds:
        return _plan_by_kind(kinds, verdicts, machine, problem)
    plan = _plan_by_rank(verdicts)
    if plan.chosen is None:
        return plan
    if (replaced := _replace_if_mixing(plan, problem)) is not plan:
        return replaced
    if groups := _choose_groups(backends, machine, problem):
        reason = (
            "the model's layers differ, and each group runs the best backend that fits it: "
            f"{_describe_groups(groups)}; the best one for all layers would be "
            f"{plan.chosen.backend.name}"
        )
        return replace(plan, groups=groups, reason=reason)
    return replace(plan, reason=_rank_reason(plan, plan.chosen, machine, problem))


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan with all candidates and reasons as a dict, as `explain --json` prints it."""
    chosen = plan.chosen
    return {
        "asked": plan.requested,
        "because": plan.reason,
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
        and {"backend": chosen.backend.name, "kernel": chosen.kernel, "because": plan.reason},
        "groups": [
            {
                "layers": asdict(choice.layers),
                "backend": choice.verdict.backend.name,
                "kernel": choice.verdict.kernel,
            }
            for choice in plan.groups
        ],
    }


def rule_out(plan: Plan, backend: str, reason: Reason) -> Plan:
    """Return the plan without a backend that failed its proof or does not isolate documents.

    If `backend` is the router of groups of layers, all layers get the plan's best single backend.
    Otherwise `auto` chooses the next candidate, and a named member of the flash family is replaced
    by the next member. Any other backend that the config names is never replaced.
    """
    if plan.groups and backend not in {v.backend.name for v in plan.verdicts}:
        text = f"groups of layers could not run different backends: {reason.text}"
        return replace(plan, groups=(), reason=text)
    verdicts = tuple(
        replace(v, reasons=(*v.reasons, reason), kernel=None) if v.backend.name == backend else v
        for v in plan.verdicts
    )
    named = find_backend(plan.requested)
    if named is not None and named.family and not plan.strict:
        return _plan_for(named, verdicts, strict=False, by=plan.requested_by)
    if plan.requested != AUTO or plan.requested_by == "attn_backends":
        remedy = f"{set_backend('auto')}, which tries the next one"
        if plan.requested_by == VARIABLE:
            remedy = f"unset {VARIABLE}: auto tries the next one"
        if plan.requested_by == "attn_backends":
            remedy = "remove attn_backends: auto tries the next one"
        text = f"{backend}: {reason.text}"
        return replace(plan, chosen=None, reason=text, verdicts=verdicts, remedy=remedy)
    return _plan_by_rank(verdicts)


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


def _replace_if_mixing(plan: Plan, problem: Problem) -> Plan:
    """Return the plan with the best backend that isolates documents; `plan` itself if none does."""
    following = plan
    while (error := mixing_error(following, problem)) is not None:
        masked = _masked_backend(following)
        assert masked is not None
        reason = Reason(code=error.code, text=error.why.splitlines()[0])
        following = rule_out(following, masked.name, reason)
    return following if following.chosen is not None else plan


def _plan_by_rank(verdicts: tuple[Verdict, ...]) -> Plan:
    """Return the plan of `auto`: the best-ranked backend that fits."""
    if not (candidates := _automatic(verdicts)):
        text = "no attention backend fits"
        if dtype := _dtype_reason(verdicts):
            text += f"; not even eager, which supports every model: {dtype}"
        remedy = _nothing_fits_remedy(verdicts)
        return Plan(requested=AUTO, chosen=None, reason=text, verdicts=verdicts, remedy=remedy)
    text = f"{candidates[0].backend.name} has the best rank of the backends that still fit"
    return Plan(requested=AUTO, chosen=candidates[0], reason=text, verdicts=verdicts)


def _plan_for(
    named: Backend, verdicts: tuple[Verdict, ...], *, strict: bool, by: RequestedBy
) -> Plan:
    """Return the plan for a backend that is named by the config or by a variable."""
    source = "the config" if by == "config" else by
    plan = Plan(requested=named.name, chosen=None, reason="", verdicts=verdicts, requested_by=by)
    own = next(verdict for verdict in verdicts if verdict.backend.name == named.name)
    # flash_attention_2 and flash_attention_3 may be replaced by another member of the family;
    # flash_attention_4 may not.
    any_member = named.uses_flash_lib and named.family is not None and not strict
    if any_member and not any(reason.code in _ARCH_CODES for reason in own.reasons):
        for verdict in verdicts:
            member = verdict.backend.family == named.family and verdict.backend.applied_as
            if member and verdict.fits:
                return replace(plan, chosen=verdict, reason=_family_reason(own, verdict, source))
    if own.fits and named.applied_as:
        return replace(plan, chosen=own, reason=f"{source} names it, and it fits")
    text = "; ".join(reason.text for reason in own.reasons)
    if own.fits:
        text = "it would fit, but this version of attnimg cannot apply it yet"
    remedy = _nothing_fits_remedy(verdicts)
    if others := _automatic(verdicts):
        name = others[0].backend.name
        line = f"set {VARIABLE}={name}" if by == VARIABLE else set_backend(name)
        remedy = f"{line}, which fits"
    if by == VARIABLE:
        remedy += f", or unset {VARIABLE}"
    if by == "attn_backends":
        remedy = "remove attn_backends, or name another backend in it"
    return replace(plan, reason=text, remedy=remedy)


def _automatic(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the verdicts of backends that fit and that `auto` may choose."""
    return [verdict for verdict in verdicts if verdict.fits and _is_automatic(verdict.backend)]


def _is_automatic(backend: Backend) -> bool:
    return backend.automatic and backend.applied_as is not None


def _nothing_fits_remedy(verdicts: tuple[Verdict, ...]) -> str:
    """Return what to do if no backend fits: change the precision, if that is the reason."""
    if _dtype_reason(verdicts):
        return "set bf16: auto, which selects a precision that the GPU supports"
    return "see the reasons against each backend, which attnimg explain prints"


def _dtype_reason(verdicts: tuple[Verdict, ...]) -> str:
    """Return why eager does not support the precision of the run; "" if it does."""
    reasons = (reason for v in verdicts if v.backend.name == "eager" for reason in v.reasons)
    return next((reason.text for reason in reasons if reason.code == "dtype"), "")


def _sort_family(backends: list[Backend], family: str) -> list[Backend]:
    """Return the candidates, with the members of a family ordered by their general ranks: 4, 3, 2.

    This order is used if the config names a member of the family; `auto` uses the ranks for the
    architecture. Timings are not used yet; those in docs/gpu-runs are meant to replace this order
    on the same GPU with the same versions of torch, the kernel and Python.
    """
    members = iter([backend for backend in all_backends() if backend.family == family])
    return [next(members) if backend.family == family else backend for backend in backends]


def _sort_by_rank(
    backends: Iterable[Backend], machine: Machine, problem: Problem, *, routed: bool = False
) -> list[Backend]:
    """Return the candidates in the order in which `auto` tries them; see find_rank."""
    return sorted(backends, key=lambda b: find_rank(b, machine, problem, routed=routed).rank)


def find_rank(
    backend: Backend, machine: Machine, problem: Problem, *, routed: bool = False
) -> Rank:
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
    order = _sort_by_rank(backends, machine, problem, routed=True)
    choices: list[tuple[LayerGroup, dict[str, Verdict], Verdict]] = []
    for group in problem.model.layers:
        alone = replace(problem, model=replace(problem.model, layers=(group,)))
        verdicts = {b.name: judge(b, machine, alone, rank=i) for i, b in enumerate(order, 1)}
        best = next(iter(_automatic(verdicts.values())), None)
        if best is None or _reason_against_router(best.backend, group, problem):
            return ()
        choices.append((group, verdicts, best))
    # The environment variables of such a backend affect all layers that run its package.
    for whole in [best.backend for _, _, best in choices if best.backend.for_process]:
        for i, (group, verdicts, best) in enumerate(choices):
            same_package = best.backend.needs.packages == whole.needs.packages
            if same_package and verdicts[whole.name].fits:
                choices[i] = (group, verdicts, verdicts[whole.name])
    if len({best.backend.name for _, _, best in choices}) == 1:
        return ()
    return tuple(GroupChoice(layers=group, verdict=best) for group, _, best in choices)


def _plan_by_kind(
    kinds: Mapping[LayerKind, str],
    verdicts: tuple[Verdict, ...],
    machine: Machine,
    problem: Problem,
) -> Plan:
    """Return the plan in which each kind of layers runs the backend that attn_backends names.

    Kinds that it does not name get the best backend that fits them. A named backend is never
    replaced: if it does not fit its layers, the plan chooses nothing.
    """
    key: RequestedBy = "attn_backends"
    layers = problem.model.layers if problem.model else ()
    nothing = Plan(requested=AUTO, chosen=None, reason="", verdicts=verdicts, requested_by=key)
    if absent := sorted(kinds.keys() - {layer.kind for layer in layers}):
        of_model = f"no {absent[0]} layers" if layers else "layers that are not known here"
        reason = f"{key} names a backend for {absent[0]} layers, and the model has {of_model}"
        return replace(nothing, reason=reason, remedy=f"remove {absent[0]} from {key}")
    order = _sort_by_rank([v.backend for v in verdicts], machine, problem, routed=True)
    choices: list[GroupChoice] = []
    for layer in layers:
        assert problem.model is not None
        alone = replace(problem, model=replace(problem.model, layers=(layer,)))
        named = find_backend(kinds.get(layer.kind, AUTO))
        candidates = [named] if named else [b for b in order if _is_automatic(b)]
        judged = [judge(b, machine, alone, rank=n) for n, b in enumerate(candidates, 1)]
        fitting = next((v for v in judged if v.fits), None)
        if fitting is None:
            reasons = "; ".join(found.text for found in judged[0].reasons)
            reason = f"{judged[0].backend.name} does not fit {_describe_layers(layer)}: {reasons}"
            remedy = f"name another backend for {layer.kind} layers in {key}, or remove it"
            return replace(nothing, reason=reason, remedy=remedy)
        choices.append(GroupChoice(layers=layer, verdict=fitting))
    backends = {choice.verdict.backend.name: choice.verdict.backend for choice in choices}
    if len(backends) == 1:
        (only,) = backends.values()
        if only.name not in {verdict.backend.name for verdict in verdicts}:
            verdicts = (*verdicts, judge(only, machine, problem, rank=len(verdicts) + 1))
        return _plan_for(only, verdicts, strict=True, by=key)
    for choice in choices:
        backend = choice.verdict.backend
        against = _reason_against_router(backend, choice.layers, problem)
        if against is None and backend.for_process:
            against = (
                f"the variables of {backend.name} affect all layers, so all layers must run it"
            )
        if against is not None:
            remedy = f"name one backend for all layers in {key}"
            return replace(nothing, reason=against, remedy=remedy)
    groups, chosen = tuple(choices), choices[0].verdict
    reason = f"the backends that {key} names fit: {_describe_groups(groups)}"
    return replace(nothing, chosen=chosen, groups=groups, reason=reason)


def _reason_against_router(backend: Backend, layers: LayerGroup, problem: Problem) -> str | None:
    """Return why a router can't call the backend of a group of layers; None if it can.

    A router passes only the padding mask, so flex_attention would get no block mask; and torch's
    exact attention has neither soft cap nor sinks.
    """
    if problem.model_class and (own := reason_against_registered(problem.model_class, "a router")):
        return own.text
    if backend.mask == "flex":
        return f"{backend.name} needs a mask of its own, so all layers must run it"
    if backend.mask != "flash" and (layers.softcap or layers.sinks):
        return f"{backend.name} has no soft cap or sinks where other layers run another backend"
    return None


def _require_backend_name(name: str) -> None:
    """Raise for a value of ATTNIMG_BACKEND that is not a backend."""
    for error in name_errors(name):
        raise AttnimgError(
            f"{VARIABLE}: {error.what}",
            why=error.why,
            do=f"{error.do}; or unset {VARIABLE}",
            code="bad-environment",
        )


def _rank_reason(plan: Plan, chosen: Verdict, machine: Machine, problem: Problem) -> str:
    """Return in one sentence why `auto` chose its backend.

    The sentence has the number of backends that fit, why this one has the best rank, and why
    better-ranked ones were not chosen.
    """
    candidates, name = _automatic(plan.verdicts), chosen.backend.name
    words = ["compiled"] * problem.compiled + ["packed"] * problem.packing
    run = f"{' '.join([*words, 'training'])} on {machine.arch.name}"
    fit = "fits" if len(candidates) == 1 else "fit"
    count = f"{len(candidates)} of {len(plan.verdicts)} backends {fit} {run}"
    by_name = [v.backend.name for v in plan.verdicts if v.fits and v not in candidates]
    if by_name:
        count += f" ({', '.join(by_name)}: only when the config names it)"
    if len(candidates) == 1:
        return f"{count}: {name}"
    parts = [f"{count}; {name} has the best rank of them"]
    general = chosen.backend.rank
    rank = find_rank(chosen.backend, machine, problem)
    if rank.rank <= general:
        parts[0] += f": it {rank.why} [{rank.source}]"
    for backend in (verdict.backend for verdict in candidates[1:]):
        rank = find_rank(backend, machine, problem)
        if rank.rank > backend.rank < general:
            parts.append(f"{backend.name} {rank.why} [{rank.source}]")
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


def _family_reason(requested: Verdict, chosen: Verdict, source: str) -> str:
    """Return why a member of the flash family was chosen when `source` names a member."""
    name, other = requested.backend.name, chosen.backend.name
    rule = (
        f"{source} names {name}, which asks for the flash family, whose order is 4, 3, 2 "
        "until this GPU is timed"
    )
    if requested.fits:
        return f"{rule}; {'it' if name == other else other} is the first of them that fits"
    reason = requested.reasons[0].text
    return f"{rule}; {name} does not fit ({reason}), {other} is the first that does"


def _describe_groups(groups: Sequence[GroupChoice]) -> str:
    parts = [f"{_describe_layers(one.layers)} run {one.verdict.backend.name}" for one in groups]
    return "; ".join(parts)


def _describe_layers(group: LayerGroup) -> str:
    """Return a group of layers as text: its number, its head_dim, and its features."""
    text = f"{counted(group.count, 'layer')} of head_dim {group.head_dim_qk}"
    if group.head_dim_v != group.head_dim_qk:
        text += f" (v {group.head_dim_v})"
    extras = [
        f"window {group.window}" if group.window else "",
        f"soft cap {group.softcap:g}" if group.softcap else "",
        "sinks" if group.sinks else "",
    ]
    return f"{text} with {' and '.join(filter(None, extras))}" if any(extras) else text

"""Select an attention backend, verify it, apply it to a model and check its packing.

    select -> verify -> load -> check packing; if a step fails, repeat with the next candidate

The Python API and the commands `verify` and `train` call these functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from attnimg import application
from attnimg.backends._transformers import is_called_directly
from attnimg.cgroup import memory_limit
from attnimg.context import build_context
from attnimg.errors import AttnimgError, KernelError, PackingLeak, set_backend
from attnimg.facts import Backend, Finding, Machine
from attnimg.run_facts import LayerGroup, Plan, Problem, Proof, Reason, RunContext
from attnimg.selection import plan as planning
from attnimg.selection.run_findings import other_layers, run_findings
from attnimg.task import Task, machine_warnings

if TYPE_CHECKING:
    from attnimg.verification.isolation import Collate, IsolationProof

# If these are the only reasons against a backend, a kernel is missing; others are in the config.
_KERNEL_MISSING = frozenset({"not-installed", "version-low", "fp8-torchao", "fp8-needs-fa3"})


class Report(Protocol):
    """The interface through which the pipeline reports its results, on a terminal or in a log."""

    def log(self, text: str) -> None:
        """Report one line."""

    def warn_replaced(self, text: str) -> None:
        """Report why a backend is replaced by the next candidate."""

    def show_plan(self, plan: Plan, task: Task, warnings: Sequence[Finding]) -> None:
        """Report a plan that chose a backend, and its warnings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """A verified backend, loaded and registered with transformers.

    Attributes:
        plan: the plan that chose it; all its backends passed their proofs.
        backend: the backend, or a router between the backends of the plan's groups of layers.
        context: the precision, packing and batch shape of the run's calls.
        implementation: the attention implementation to load the model with.
        proofs: the proofs of all backends that were tried, including failed ones.
    """

    plan: Plan
    backend: Backend
    context: RunContext
    implementation: str
    proofs: tuple[Proof, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """A model that runs a verified backend.

    Attributes:
        model: the loaded model.
        selected: the backend that it runs.
        isolation: the result of the isolation check; None without packing.
    """

    model: Any
    selected: Selected
    isolation: IsolationProof | None


def select_verify_apply(
    task: Task,
    load: Callable[[Selected], Any],
    *,
    report: Report,
    plan: Plan | None = None,
    collate: Collate | None = None,
) -> Applied:
    """Select a backend, verify it, load the model with it and check its packing.

    A backend that fails its proof or leaks between packed documents is replaced by the next
    candidate, if the config allows that. torch and transformers are imported here. Call it inside
    `application.restore_registries()`, so that transformers' registries are restored.

    Args:
        task: what the backend is selected for.
        load: a function that loads the model with `selected.implementation`; called once.
        report: receives plans, proofs and warnings.
        plan: the result of `select` for this task, if it was called before.
        collate: builds the batch of the packing check; None for attnimg's own collator.

    Raises:
        AttnimgError: no allowed backend fits, passes its proof and isolates documents.
    """
    plan, proofs = verify_plan(plan or select(task, report), task, report)
    selected = _load_selected(plan, task, proofs)
    model = load(selected)
    application.require_applied(model, selected.backend)
    if not task.problem.packing:
        return Applied(model=model, selected=selected, isolation=None)
    from attnimg.application.by_document import call_by_document
    from attnimg.verification.isolation import check_isolation, require_isolation

    if modules := layers_by_document(task):
        call_by_document(model, modules)

    while True:
        name = selected.backend.name
        isolation = check_isolation(
            model, implementation=name, context=selected.context, collate=collate
        )
        if isolation.isolated:
            report.log(f"packing: isolated on {name} ({isolation.why})")
            return Applied(model=model, selected=selected, isolation=isolation)
        reason = Reason(code=isolation.code or "packing-not-isolated", text=isolation.why)
        following = planning.rule_out(plan, name, reason)
        if following.chosen is None:
            require_isolation(isolation)
        following, proofs = verify_plan(following, task, report)
        report.warn_replaced(f"packing: {name} is not used ({reason.code}): {isolation.why}")
        try:
            application.switch_backend(
                model,
                application.plan_backend(following),
                layers=_layers(task),
                trusted=task.problem.trusted,
            )
        except AttnimgError:  # a model that does not use transformers' attention interface
            require_isolation(isolation)
        plan = _report_plan(following, task, report)
        selected = replace(
            selected,
            plan=plan,
            backend=application.plan_backend(plan),
            context=build_context(task.problem, application.plan_backend(plan)),
            implementation=application.current_implementation(model),
            proofs=(*selected.proofs, *proofs),
        )


def select(task: Task, report: Report) -> Plan:
    """Return a plan that chose a backend, and report it with its warnings.

    Raises:
        AttnimgError: no backend fits, or packed documents would mix.
    """
    return _report_plan(task.choose(), task, report)


def verify_plan(
    plan: Plan, task: Task, report: Report, *, direct: bool = False
) -> tuple[Plan, tuple[Proof, ...]]:
    """Verify a plan's backends; replace one that fails by the next candidate.

    Args:
        plan: a plan that chose a backend.
        task: what it was chosen for.
        report: receives plans and proofs.
        direct: whether kernels are called without a model, as `attnimg.attention` calls them.

    Returns:
        A plan whose backends passed, and all proofs, including failed ones.

    Raises:
        AttnimgError: no backend that the plan may use passed; the error has the code of the first
            reason of the last proof.
    """
    made: list[Proof] = []
    while True:
        failed = None
        for backend, part in split_by_backend(plan, task.problem):
            (proof,) = prove_backends(
                [backend],
                part,
                machine=task.machine,
                log=report.log,
                routed=bool(plan.groups) or (direct and is_called_directly(backend)),
            )
            made.append(proof)
            if not proof.passed:
                failed = proof
                break
            report.log(describe_proof(proof))
        if failed is None:
            return plan, tuple(made)
        reason = Reason(
            code=failed.reasons[0].code, text=f"failed its proof: {_reasons_text(failed)}"
        )
        following = planning.rule_out(plan, failed.backend, reason)
        if following.chosen is None:
            raise _failed_proof(failed, do=following.remedy)
        report.warn_replaced(describe_proof(failed))
        plan = _report_plan(following, task, report)


def prove_backends(
    backends: list[Backend],
    problem: Problem,
    *,
    machine: Machine,
    log: Callable[[str], None],
    routed: bool = False,
) -> list[Proof]:
    """Prove each backend, or read its proof from the cache; return the proofs."""
    from attnimg.verification.proofs import Setting, prove

    setting = Setting.here(machine, os.environ)
    return prove(backends, problem, setting=setting, log=log, routed=routed)


def prove_fitting(task: Task, *, log: Callable[[str], None]) -> list[tuple[Problem, Proof]]:
    """Prove every backend that fits a task.

    Where groups of layers have different backends, these are also proven as a router calls them.

    Returns:
        The proofs, each with the problem that it was made for.
    """
    plan, problem, machine = task.choose(), task.problem, task.machine
    fitting = [verdict.backend for verdict in plan.verdicts if verdict.fits]
    fitting = [backend for backend in fitting if backend.applied_as is not None]
    proofs = [(problem, p) for p in prove_backends(fitting, problem, machine=machine, log=log)]
    for backend, part in split_by_backend(plan, problem) if plan.groups else ():
        (proof,) = prove_backends([backend], part, machine=machine, log=log, routed=True)
        proofs.append((part, proof))
    return proofs


def find_warnings(plan: Plan, task: Task) -> tuple[Finding, ...]:
    """Return the warnings on a plan and on the machine."""
    _, warnings = run_findings(plan, task.problem, task.machine)
    return (*warnings, *machine_warnings(task.machine))


def layers_by_document(task: Task) -> frozenset[str]:
    """Return the classes of layers that are called once per document in a packed run."""
    found = other_layers(task.problem.model, task.machine)
    return frozenset(name for layers in found for name in layers.modules)


def kernel_hashes(plan: Plan, task: Task) -> dict[str, dict[str, str] | None]:
    """Return backend -> hashes of its kernel's files; None where the files are not known."""
    from attnimg.verification.proofs import Setting, hash_files

    setting = Setting.here(task.machine, os.environ)
    return {
        backend.name: hash_files(backend, setting=setting, trusted=part.trusted)
        for backend, part in split_by_backend(plan, task.problem)
    }


def split_by_backend(plan: Plan, problem: Problem) -> list[tuple[Backend, Problem]]:
    """Return the backends of a plan, each with a problem that has only the layers it runs."""
    assert plan.chosen is not None
    if not plan.groups or problem.model is None:
        return [(plan.chosen.backend, problem)]
    layers_by_name: dict[str, list[LayerGroup]] = {}
    for choice in plan.groups:
        layers_by_name.setdefault(choice.verdict.backend.name, []).append(choice.layers)
    backends = {choice.verdict.backend.name: choice.verdict.backend for choice in plan.groups}
    return [
        (backends[name], replace(problem, model=replace(problem.model, layers=tuple(layers))))
        for name, layers in layers_by_name.items()
    ]


def describe_proof(proof: Proof) -> str:
    """Return a proof as one line of text."""
    if not proof.passed:
        return f"proof: {proof.backend} failed: {_reasons_text(proof)}"
    parts = [
        f"{figure.quantity} {figure.error:.0e} (allowed {figure.allowed:.0e})"
        for figure in proof.figures
        if figure.allowed < float("inf")
    ]
    how = "from the cache" if proof.cached else f"{proof.seconds:.1f} s"
    note = f"; {proof.note}" if proof.note else ""
    figures = f": {', '.join(parts)}" if parts else ""
    return f"proof: {proof.backend} passed {proof.cases} probes, {how}{figures}{note}"


def _report_plan(plan: Plan, task: Task, report: Report) -> Plan:
    """Report a plan; raise if it chose no backend, or if packed documents would mix."""
    if plan.chosen is None:
        raise _nothing_fits(plan)
    errors, warnings = run_findings(plan, task.problem, task.machine)
    report.show_plan(plan, task, () if errors else warnings)
    for error in errors:
        kind = PackingLeak if error.code == "packing-not-isolated" else AttnimgError
        raise kind(error.what, why=error.why, do=error.do, code=error.code, key=error.key)
    return plan


def _load_selected(plan: Plan, task: Task, proofs: tuple[Proof, ...]) -> Selected:
    """Load the kernel of a verified plan, and register it with transformers."""
    backend = application.plan_backend(plan)
    implementation = application.load_and_register(
        backend, layers=_layers(task), trusted=task.problem.trusted
    )
    context = build_context(task.problem, backend)
    return Selected(
        plan=plan, backend=backend, context=context, implementation=implementation, proofs=proofs
    )


def _layers(task: Task) -> tuple[LayerGroup, ...]:
    return task.problem.model.layers if task.problem.model else ()


def _reasons_text(proof: Proof) -> str:
    return "; ".join(f"{reason.code}: {reason.text}" for reason in proof.reasons)


def _nothing_fits(plan: Plan) -> KernelError:
    named = next((v for v in plan.verdicts if v.backend.name == plan.requested), None)
    against = named.reasons if named else ()
    why = [f"{reason.code}: {reason.text}" for reason in against] or [plan.reason]
    missing = bool(against) and {reason.code for reason in against} <= _KERNEL_MISSING
    return KernelError(
        f"{plan.requested} cannot be used here" if named else "no attention backend fits",
        why="\n".join(why),
        do=plan.remedy,
        code=against[0].code if against else "not-built",
        exit_code=1 if missing else 2,
    )


def _failed_proof(failed: Proof, *, do: str) -> KernelError:
    found = "\n".join(f"found {reason.code}: {reason.text}" for reason in failed.reasons)
    if failed.reasons[0].code == "oom" and memory_limit() is not None:
        do = "raise the memory limit of the container or job (docker run --memory), or lift it"
    return KernelError(
        f"{failed.backend} failed its proof on this machine",
        why=f"{found}\nneeded: the outputs and gradients of plain attention",
        do=do or f"{set_backend('sdpa')}, and report the kernel to its publisher",
        code=failed.reasons[0].code,
        exit_code=1,
    )

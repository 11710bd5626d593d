"""Prove what a plan chose before anything is trained on it; what fails makes way or stops."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from attnimg.errors import AttnimgError
from attnimg.facts import Backend, LayerGroup, Machine, Plan, Problem, Proof, Reason
from attnimg.select import plan


def proofs(
    backends: list[Backend],
    problem: Problem,
    *,
    machine: Machine,
    say: Callable[[str], None],
    routed: bool = False,
) -> list[Proof]:
    """Prove backends on this machine, or read from the disk that they were."""
    from attnimg.verify.proofs import Setting, prove

    setting = Setting.here(machine, os.environ)
    return prove(backends, problem, setting=setting, say=say, routed=routed)


def kernel_content(backend: Backend, *, machine: Machine, trusted: bool) -> dict[str, str] | None:
    """Return hashes of the files of a backend's kernel; None where some are unknown.

    Args:
        backend: one that fits the machine.
        machine: this one.
        trusted: whether the user set trust_remote_code.
    """
    from attnimg.verify.proofs import Setting, content_of

    setting = Setting.here(machine, os.environ)
    return content_of(backend, setting=setting, trusted=trusted)


def proven_plan(
    found: Plan,
    problem: Problem,
    *,
    machine: Machine,
    say: Callable[[str], None],
    shown: Callable[[Plan], Plan],
) -> tuple[Plan, list[Proof]]:
    """Prove a plan's backends, going on to the next candidate where the plan may.

    Args:
        found: a plan that chose a backend.
        problem: what the run has to do.
        machine: this one.
        say: told each proof in a line.
        shown: prints a plan that replaced another.

    Returns:
        A plan whose backends passed, and every proof that was made, failed ones included.

    Raises:
        AttnimgError: nothing that the plan may take passed; its code is the first broken rule's.
    """
    made: list[Proof] = []
    while True:
        failed = None
        for backend, part in parts_of(found, problem):
            (proof,) = proofs([backend], part, machine=machine, say=say, routed=bool(found.groups))
            made.append(proof)
            if not proof.passed:
                failed = proof
                break
            say(sentence(proof))
        if failed is None:
            return found, made
        reason = Reason(code=failed.reasons[0].code, text=f"failed its proof: {_told(failed)}")
        following = plan.without(found, failed.backend, reason)
        if following.chosen is None:
            raise _refusal(failed, do=following.do)
        say(sentence(failed))
        found = shown(following)


def sentence(proof: Proof) -> str:
    """Return a proof as one line of text."""
    if not proof.passed:
        return f"proof: {proof.backend} failed: {_told(proof)}"
    parts = [
        f"{figure.quantity} {figure.error:.0e} (allowed {figure.allowed:.0e})"
        for figure in proof.figures
        if figure.allowed < float("inf")
    ]
    how = "kept from an earlier run" if proof.cached else f"{proof.seconds:.1f} s"
    note = f"; {proof.note}" if proof.note else ""
    shown = f": {', '.join(parts)}" if parts else ""
    return f"proof: {proof.backend} passed {proof.cases} probes, {how}{shown}{note}"


def parts_of(found: Plan, problem: Problem) -> list[tuple[Backend, Problem]]:
    """Pair each backend of a plan that chose one with the layers that it runs."""
    assert found.chosen is not None
    if not found.groups or problem.model is None:
        return [(found.chosen.backend, problem)]
    layers_of: dict[str, list[LayerGroup]] = {}
    backends = {choice.verdict.backend.name: choice.verdict.backend for choice in found.groups}
    for choice in found.groups:
        layers_of.setdefault(choice.verdict.backend.name, []).append(choice.layers)
    return [
        (backends[name], replace(problem, model=replace(problem.model, layers=tuple(layers))))
        for name, layers in layers_of.items()
    ]


def _told(proof: Proof) -> str:
    return "; ".join(f"{reason.code}: {reason.text}" for reason in proof.reasons)


def _refusal(failed: Proof, *, do: str) -> AttnimgError:
    found = "\n".join(f"found {reason.code}: {reason.text}" for reason in failed.reasons)
    return AttnimgError(
        f"{failed.backend} failed its proof on this machine",
        why=f"{found}\nneeded: what plain attention gives, forward and backward",
        do=do or "set attn_implementation: sdpa, and report the kernel to its publisher",
        code=failed.reasons[0].code,
        key="attn_implementation",
        exit_code=1,
    )

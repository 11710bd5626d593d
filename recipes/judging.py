"""Judge an artifact by the gates of its recipe, and write the verdicts for people and programs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from recipes.artifact.facts import Artifact
from recipes.constraints import pins
from recipes.facts import Allowance, Plan, Recipes, Unresolved
from recipes.gate_facts import Finding, Gate, Promise


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one gate says.

    Attributes:
        findings: what speaks against the artifact.
        allowed: what would, were it not in allowed.toml, each with the reason.
        unjudged: why it was not judged; empty when it was.
    """

    gate: str
    findings: tuple[Finding, ...] = ()
    allowed: tuple[tuple[Finding, str], ...] = ()
    unjudged: str = ""


def promise_of(plan: Plan, recipes: Recipes, *, lock: str, tools: str) -> Promise:
    """Gather what an image is held to.

    Args:
        plan: the image's.
        recipes: what it was made from.
        lock: the text of its lock file.
        tools: the text of the lock file of what every image has.
    """
    release = (
        None if isinstance(plan.image.torch, Unresolved) else recipes.torch.get(plan.image.torch)
    )
    return Promise(
        plan=plan,
        torch_archs=release.archs if release and plan.image.accelerator == "cuda" else (),
        pins=pins(plan, lock=lock + tools),
        floor=recipes.bases.get(plan.image.base),
    )


def judged(
    artifact: Artifact, promise: Promise, gates: Iterable[Gate], allowances: Iterable[Allowance]
) -> tuple[Verdict, ...]:
    """Ask every gate."""
    kept = tuple(allowances)
    return tuple(_verdict(artifact, promise, gate, kept) for gate in gates)


def _verdict(
    artifact: Artifact, promise: Promise, gate: Gate, allowances: tuple[Allowance, ...]
) -> Verdict:
    if why := gate.unjudged(artifact, promise):
        return Verdict(gate=gate.name, unjudged=why)
    findings, allowed = [], []
    for finding in gate.judge(artifact, promise):
        reason = next((a.reason for a in allowances if _allows(a, finding)), None)
        if reason is None:
            findings.append(finding)
        else:
            allowed.append((finding, reason))
    return Verdict(gate=gate.name, findings=tuple(findings), allowed=tuple(allowed))


def _allows(allowance: Allowance, finding: Finding) -> bool:
    return (
        allowance.gate == finding.gate
        and fnmatch.fnmatchcase(finding.file, allowance.file)
        and allowance.found in finding.found
    )


def report(name: str, artifact: Artifact, verdicts: Iterable[Verdict]) -> str:
    """Write a line for each gate, and each finding in three parts."""
    lines = [f"{name}: {artifact.source}, {len(artifact.files)} files"]
    lines += [f"  MB with zstd -3: {sizes}"] if (sizes := _sizes(artifact)) else []
    for verdict in verdicts:
        count = len(verdict.findings)
        says = f"FAILED: {count} finding{'s' if count > 1 else ''}" if count else "passed"
        if verdict.unjudged:
            says = f"not judged: {verdict.unjudged}"
        extra = f" ({len(verdict.allowed)} allowed)" if verdict.allowed else ""
        lines.append(f"  {verdict.gate:<13} {says}{extra}")
        for one in verdict.findings:
            lines += [f"    {one.file}", f"      why: found {one.found}; needed {one.needed}"]
            lines += [f"      do:  {one.do}"]
    return "\n".join(lines)


def _sizes(artifact: Artifact) -> str:
    """Write what each stage's layers take, and all of them; empty where that is not known."""
    stages: dict[str, float] = {}
    for layer in artifact.layers:
        if layer.zstd_bytes is None:
            return ""
        stages[layer.name] = stages.get(layer.name, 0.0) + layer.zstd_bytes / 1e6
    each = ", ".join(f"{name} {size:.1f}" for name, size in stages.items())
    return f"{each}; in all {sum(stages.values()):.1f}" if each else ""


def report_json(name: str, artifact: Artifact, verdicts: Iterable[Verdict]) -> str:
    """Write the same as JSON, with layers and what was allowed and why."""
    gates = [asdict(verdict) for verdict in verdicts]
    content: Mapping[str, object] = {
        "image": name,
        "source": artifact.source,
        "kind": artifact.kind,
        "layers": [asdict(layer) for layer in artifact.layers],
        "gates": gates,
        "passed": not any(gate["findings"] for gate in gates),
    }
    return json.dumps(content, indent=1)

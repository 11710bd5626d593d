"""Check an artifact by every gate, and report the results as text or JSON."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from attnimg.errors import AttnimgError
from recipes.artifact.facts import Artifact
from recipes.artifact.packages import write_sbom
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.facts import Allowance, ImagePlan, Recipes, Unresolved
from recipes.files import write_all
from recipes.gates import Expected, Gate, GateFinding, all_gates
from recipes.solve.lock import pinned_versions, read_locks


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """The result of one gate.

    Attributes:
        findings: reasons why the artifact may not be shipped.
        allowed: findings that allowed.toml accepts, each with the reason.
        skip_reason: why the gate could not check the artifact; empty if it could.
    """

    gate: str
    findings: tuple[GateFinding, ...] = ()
    allowed: tuple[tuple[GateFinding, str], ...] = ()
    skip_reason: str = ""


def expected_contents(plan: ImagePlan, recipes: Recipes, *, lock: str, tools: str) -> Expected:
    """Return what an image is checked against.

    Args:
        plan: of the image.
        recipes: what the plan was made from.
        lock: the text of its lock file.
        tools: the text of the lock file of the packages that every image has.
    """
    release = (
        None if isinstance(plan.image.torch, Unresolved) else recipes.torch.get(plan.image.torch)
    )
    return Expected(
        plan=plan,
        torch_archs=release.archs if release and plan.image.accelerator == "cuda" else (),
        pins=pinned_versions(plan, lock=lock + tools),
        floor=recipes.bases.get(plan.image.base),
    )


def run_all(
    artifact: Artifact, expected: Expected, gates: Iterable[Gate], allowances: Iterable[Allowance]
) -> tuple[GateResult, ...]:
    """Return the result of each gate."""
    kept = tuple(allowances)
    return tuple(_verdict(artifact, expected, gate, kept) for gate in gates)


def _verdict(
    artifact: Artifact, expected: Expected, gate: Gate, allowances: tuple[Allowance, ...]
) -> GateResult:
    if why := gate.skip_reason(artifact, expected):
        return GateResult(gate=gate.name, skip_reason=why)
    findings, allowed = [], []
    for finding in gate.check(artifact, expected):
        reason = next((a.reason for a in allowances if _allows(a, finding)), None)
        if reason is None:
            findings.append(finding)
        else:
            allowed.append((finding, reason))
    return GateResult(gate=gate.name, findings=tuple(findings), allowed=tuple(allowed))


def _allows(allowance: Allowance, finding: GateFinding) -> bool:
    return (
        allowance.gate == finding.gate
        and fnmatch.fnmatchcase(finding.file, allowance.file)
        and allowance.found in finding.found
    )


def format_report(name: str, artifact: Artifact, verdicts: Iterable[GateResult]) -> str:
    """Return a line for each gate, and each finding in three parts."""
    lines = [f"{name}: {artifact.source}, {len(artifact.files)} files"]
    lines += [f"  MB with zstd -3: {sizes}"] if (sizes := _sizes(artifact)) else []
    for verdict in verdicts:
        count = len(verdict.findings)
        says = f"FAILED: {count} finding{'s' if count > 1 else ''}" if count else "passed"
        if verdict.skip_reason:
            says = f"not run_all: {verdict.skip_reason}"
        extra = f" ({len(verdict.allowed)} allowed)" if verdict.allowed else ""
        lines.append(f"  {verdict.gate:<13} {says}{extra}")
        for one in verdict.findings:
            lines += [f"    {one.file}", f"      why: found {one.found}; needed {one.needed}"]
            lines += [f"      do:  {one.do}"]
    return "\n".join(lines)


def _sizes(artifact: Artifact) -> str:
    """Return the sizes of each stage's layers and of all; empty if they are not known."""
    stages: dict[str, float] = {}
    for layer in artifact.layers:
        if layer.zstd_bytes is None:
            return ""
        stages[layer.name] = stages.get(layer.name, 0.0) + layer.zstd_bytes / 1e6
    each = ", ".join(f"{name} {size:.1f}" for name, size in stages.items())
    return f"{each}; in all {sum(stages.values()):.1f}" if each else ""


def format_json(name: str, artifact: Artifact, verdicts: Iterable[GateResult]) -> str:
    """Return the same as JSON, with the layers and the accepted findings and their reasons."""
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


_TOOLS = "docker/install/every_image.txt"


def check_artifact(
    plan: ImagePlan, recipes: Recipes, *, image: Path | None, wheels: Path | None, root: Path
) -> tuple[Artifact, tuple[GateResult, ...]]:
    """Check one artifact by every gate.

    Args:
        plan: what it should be.
        recipes: what the plan was made from.
        image: an archive of `docker save`, an OCI archive, or an unpacked image.
        wheels: a wheelhouse; with `image` it is checked as if installed there.
        root: the checkout; dist/ there gets NAME-sbom.json and NAME-licences.txt.

    Raises:
        AttnimgError: neither is given, or one of them can't be read.
    """
    artifact = _read(image, wheels)
    if artifact.kind != "wheels":
        if image is not None:
            _log("syft")
            found = write_sbom(image, root / f"dist/{plan.image.name}-sbom.json")
            artifact = replace(artifact, sbom=found)
        write_all(root, {f"dist/{plan.image.name}-licences.txt": licences(artifact)})
    expected = expected_contents(
        plan,
        recipes,
        lock=read_locks((plan,), root=root)[plan.image.name],
        tools=(root / _TOOLS).read_text(encoding="utf-8"),
    )
    return artifact, run_all(artifact, expected, all_gates(), recipes.allowed)


def licences(artifact: Artifact) -> str:
    """Return a list of each package with its version and its licence."""
    lines = (f"{one.name} {one.version}: {one.licence}" for one in artifact.distributions)
    return "\n".join(lines) + "\n"


def _read(image: Path | None, wheels: Path | None) -> Artifact:
    if image is None and wheels is None:
        raise AttnimgError(
            "there is nothing to check",
            why="found neither --archive, nor --unpacked, nor --wheels",
            do="make gate/NAME ARCHIVE=FILE, or WHEELS=dist/NAME",
        )
    below = read_image(image, log=_log) if image else None
    if wheels is not None:
        return read_wheelhouse(wheels, over=below, log=_log)
    assert below is not None
    return below


def _log(text: str) -> None:
    """Print progress to stderr: reading gigabytes takes minutes."""
    print(f"gate: reading {text}", file=sys.stderr)  # noqa: T201 - progress, not a result

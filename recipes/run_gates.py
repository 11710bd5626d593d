"""Check an artifact by every gate, and report the results as text or JSON."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from attnimg.errors import AttnimgError
from recipes.artifact.code_list import list_machine_code
from recipes.artifact.facts import Artifact, stage_sizes
from recipes.artifact.layout import write_layout
from recipes.artifact.packages import write_sbom
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.child_images import CHILD, is_childs_own, mark_child, replaced_files
from recipes.facts import Allowance, ImagePlan, Recipes
from recipes.files import sha256_of_file, write_all
from recipes.gates import ExpectedContents, Gate, GateFinding, all_gates
from recipes.solve.lock import fixed_versions, pinned_versions, read_locks

# How many findings about a child's own files the text lists; JSON has all.
_SHOWN = 5
_EVERY_IMAGE = "docker/install/every_image.txt"
# The files that decide what the gates find in an image, besides the image itself.
_CHECKED_BY = (
    "recipes/*.toml", "recipes/images/*", "recipes/kernels/*", "recipes/*.py", "recipes/solve/*.py",
    "recipes/gates/*.py", "recipes/artifact/*.py", "requirements/images/*.txt", _EVERY_IMAGE,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """The result of one gate.

    Attributes:
        findings: reasons why the artifact may not be shipped.
        allowed: findings that allowed.toml accepts, each with the reason.
        own: findings about what a child image has added, which are only named.
        skip_reason: why the gate could not check the artifact; empty if it could.
    """

    gate: str
    findings: tuple[GateFinding, ...] = ()
    allowed: tuple[tuple[GateFinding, str], ...] = ()
    own: tuple[GateFinding, ...] = ()
    skip_reason: str = ""


def check_artifact(
    plan: ImagePlan,
    recipes: Recipes,
    *,
    image: Path | None,
    wheels: Path | None,
    root: Path,
    child: bool = False,
    layout: Path | None = None,
) -> tuple[Artifact, tuple[GateResult, ...]]:
    """Check one artifact by every gate.

    Args:
        plan: of its image.
        recipes: of the plan.
        image: an archive of `docker save`, an OCI archive, or an unpacked image.
        wheels: a wheelhouse; with `image` it is checked as if installed there.
        root: the checkout; dist/ there gets NAME-sbom.json, NAME-sbom.spdx.json,
            NAME-licences.txt and NAME-machine-code.json.
        layout: a folder that gets the image as it will be pushed, with NAME-gates.json in dist/,
            which says what was checked; None writes neither.
        child: the image is made FROM this one, by somebody else; dist/ gets NAME-child-*.

    Raises:
        AttnimgError: neither is given, or one of them can't be read; or it is no child.
    """
    name, blobs = plan.name + ("-child" if child else ""), None
    if layout is not None:
        shutil.rmtree(layout, ignore_errors=True)
        blobs = layout / "blobs/sha256"
        blobs.mkdir(parents=True)
    artifact = _read(image, wheels, blobs)
    if child:
        artifact = mark_child(artifact)
    if artifact.kind != "wheels":
        if image is not None:
            _log("syft")
            packages = write_sbom(
                image,
                name=f"attnimg:{name}",
                version=artifact.image_id,
                cyclonedx=root / f"dist/{name}-sbom.json",
                spdx=root / f"dist/{name}-sbom.spdx.json",
            )
            artifact = replace(artifact, sbom=packages)
        lines = [f"{one.name} {one.version}: {one.licence}\n" for one in artifact.distributions]
        codes = json.dumps(list_machine_code(artifact), indent=1)
        texts = {f"{name}-licences.txt": "".join(lines), f"{name}-machine-code.json": codes + "\n"}
        write_all(root / "dist", texts)
    lock = read_locks((plan,), root=root)[plan.name]
    expected = expected_contents(
        plan, recipes, lock=lock + (root / _EVERY_IMAGE).read_text(encoding="utf-8")
    )
    results = run_all(artifact, expected, all_gates(), recipes.allowed)
    if layout is not None and artifact.kind == "image":
        digest = write_layout(layout, artifact.layers, artifact.config)
        gates_result = {
            **json.loads(format_json(name, artifact, results)),
            "image_id": artifact.image_id,
            "digest": digest,
            "checked_by": checked_by(root),
            "evidence": {kind: sha256_of(root / path) for kind, path in evidence(name).items()},
        }
        write_all(root, {f"dist/{name}-gates.json": json.dumps(gates_result, indent=1) + "\n"})
    return artifact, results


def evidence(name: str) -> dict[str, str]:
    """Return the files about an image that its gates write: kind -> path under the checkout."""
    return {
        "cyclonedx": f"dist/{name}-sbom.json",
        "spdx": f"dist/{name}-sbom.spdx.json",
        "machine-code": f"dist/{name}-machine-code.json",
    }


def checked_by(root: Path) -> str:
    """Return the hash of the recipes, lock files and gates of a checkout."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in _CHECKED_BY for path in root.glob(pattern)):
        found.update(f"{path.relative_to(root)} {sha256_of(path)}\n".encode())
    return found.hexdigest()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file; empty if there is none."""
    return sha256_of_file(path) if path.exists() else ""


def expected_contents(plan: ImagePlan, recipes: Recipes, *, lock: str) -> ExpectedContents:
    """Return what an image is compared with; `lock` is the text of its lock files."""
    torch = recipes.torch.get(str(plan.image.torch))
    return ExpectedContents(
        plan=plan,
        platform=plan.platform,
        torch_archs=torch.archs.get(plan.platform, ()) if torch and plan.toolkit else (),
        pins=pinned_versions(plan, lock=lock),
        base=recipes.bases.get(plan.image.base),
        fixed=frozenset(fixed_versions(plan, lock=lock)),
    )


def run_all(
    artifact: Artifact,
    expected: ExpectedContents,
    gates: Iterable[Gate],
    allowances: tuple[Allowance, ...],
) -> tuple[GateResult, ...]:
    """Return the result of each gate."""
    return tuple(_run_gate(artifact, expected, gate, allowances) for gate in gates)


def _run_gate(
    artifact: Artifact, expected: ExpectedContents, gate: Gate, allowances: tuple[Allowance, ...]
) -> GateResult:
    if reason := gate.skip_reason(artifact, expected):
        return GateResult(gate=gate.name, skip_reason=reason)
    findings, allowed, own = [], [], []
    child, fixed = any(layer.name == CHILD for layer in artifact.layers), expected.fixed
    ours = [allowance for allowance in allowances if allowance.gate == gate.name]
    for finding in gate.check(artifact, expected):
        reasons = [allowance.reason for allowance in ours if _allows(allowance, finding)]
        if reasons:
            allowed.append((finding, reasons[0]))
        elif child and is_childs_own(finding, gate=gate.name, artifact=artifact, fixed=fixed):
            own.append(finding)
        else:
            findings.append(finding)
    if child and gate.name == "pins":
        findings += replaced_files(artifact, fixed)
    return GateResult(
        gate=gate.name, findings=tuple(findings), allowed=tuple(allowed), own=tuple(own)
    )


def _allows(allowance: Allowance, finding: GateFinding) -> bool:
    return fnmatch.fnmatchcase(finding.file, allowance.file) and allowance.found in finding.found


def format_report(name: str, artifact: Artifact, results: Iterable[GateResult]) -> str:
    """Return a line for each gate, and each finding in three parts."""
    lines = [f"{name}: {artifact.source}, {len(artifact.files)} files"]
    if sizes := stage_sizes(artifact):
        each = ", ".join(f"{stage} {size:.1f}" for stage, size in sizes.items())
        lines.append(f"  MB with zstd -3: {each}; total {sum(sizes.values()):.1f}")
    for result in results:
        count = len(result.findings)
        text = f"FAILED: {count} finding{'s' if count > 1 else ''}" if count else "passed"
        if result.skip_reason:
            text = f"skipped: {result.skip_reason}"
        extra = f" ({len(result.allowed)} allowed)" if result.allowed else ""
        lines.append(f"  {result.gate:<13} {text}{extra}")
        if result.own:
            shown = [f"{finding.file} ({finding.found})" for finding in result.own[:_SHOWN]]
            more = [f"and {len(result.own) - _SHOWN} more"] if len(result.own) > _SHOWN else []
            lines.append(f"    the child's own: {', '.join([*shown, *more])}")
        for finding in result.findings:
            lines.append(f"    {finding.file}")
            lines.append(f"      why: found {finding.found}; needed {finding.needed}")
            lines.append(f"      do:  {finding.do}")
    return "\n".join(lines)


def format_json(name: str, artifact: Artifact, results: Iterable[GateResult]) -> str:
    """Return the same as JSON, with the layers and the accepted findings and their reasons."""
    gates = [asdict(result) for result in results]
    content = {
        "image": name,
        "source": artifact.source,
        "kind": artifact.kind,
        "layers": [asdict(layer) for layer in artifact.layers],
        "gates": gates,
        "passed": not any(gate["findings"] for gate in gates),
    }
    return json.dumps(content, indent=1)


def _read(image: Path | None, wheels: Path | None, blobs: Path | None) -> Artifact:
    below = read_image(image, log=_log, blobs=blobs) if image else None
    if wheels is not None:
        return read_wheelhouse(wheels, over=below, log=_log)
    if below is None:
        raise AttnimgError(
            "there is nothing to check",
            why="found neither --archive, nor --unpacked, nor --wheels",
            do="make gate/NAME ARCHIVE=FILE, or WHEELS=dist/NAME",
        )
    return below


def _log(text: str) -> None:
    """Print progress to stderr: reading gigabytes takes minutes."""
    sys.stderr.write(f"gate: reading {text}\n")

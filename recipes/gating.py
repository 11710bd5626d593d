"""Read an artifact, judge it by its recipe's gates, and write what was found to dist/."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from attnimg.errors import AttnimgError
from recipes.artifact.facts import Artifact
from recipes.artifact.read import read_image, read_wheelhouse
from recipes.artifact.sbom import write_sbom
from recipes.facts import Plan, Recipes
from recipes.files import write_all
from recipes.gates import gate_named
from recipes.judging import Verdict, judged, promise_of
from recipes.render import read_locks

_TOOLS = "docker/install/every_image.txt"


def gate_artifact(
    plan: Plan, recipes: Recipes, *, image: Path | None, wheels: Path | None, root: Path
) -> tuple[Artifact, tuple[Verdict, ...]]:
    """Judge one artifact by every gate that its recipe names.

    Args:
        plan: what it should be.
        recipes: what the plan was made from.
        image: an archive of `docker save`, an OCI archive, or an unpacked image.
        wheels: a wheelhouse; with `image` it is judged as if installed there.
        root: the checkout; dist/ there gets NAME-sbom.json and NAME-licences.txt.

    Raises:
        AttnimgError: neither is given, or one can't be read.
    """
    artifact = _read(image, wheels)
    if artifact.kind != "wheels":
        if image is not None and "sbom" in plan.image.gates:
            _say("syft")
            found = write_sbom(image, root / f"dist/{plan.image.name}-sbom.json")
            artifact = replace(artifact, sbom=found)
        write_all(root, {f"dist/{plan.image.name}-licences.txt": licences(artifact)})
    promise = promise_of(
        plan,
        recipes,
        lock=read_locks((plan,), root=root)[plan.image.name],
        tools=(root / _TOOLS).read_text(encoding="utf-8"),
    )
    gates = [gate_named(name) for name in plan.image.gates]
    return artifact, judged(artifact, promise, gates, recipes.allowed)


def licences(artifact: Artifact) -> str:
    """List each package with its version and its licence."""
    lines = (f"{one.name} {one.version}: {one.licence}" for one in artifact.distributions)
    return "\n".join(lines) + "\n"


def _read(image: Path | None, wheels: Path | None) -> Artifact:
    if image is None and wheels is None:
        raise AttnimgError(
            "there is nothing to judge",
            why="found neither --archive, nor --unpacked, nor --wheels",
            do="make gate/NAME ARCHIVE=FILE, or WHEELS=dist/NAME",
        )
    below = read_image(image, say=_say) if image else None
    if wheels is not None:
        return read_wheelhouse(wheels, over=below, say=_say)
    assert below is not None
    return below


def _say(text: str) -> None:
    """Tell of progress on stderr: reading gigabytes takes minutes."""
    print(f"gate: reading {text}", file=sys.stderr)  # noqa: T201 - progress, not a result

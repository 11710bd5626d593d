"""Write the statements about an image (SBOMs, provenance, machine code, VEX), one file each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from recipes.facts import ImagePlan, Recipes, platform_suffix
from recipes.files import read_if_exists, write_all
from recipes.release.provenance import find_builder, provenance
from recipes.release.publishable import OCI
from recipes.release.record import FOLDER, Record
from recipes.release.repository import Registry
from recipes.release.vex import vex
from recipes.run_gates import evidence

_LOCKS = ("torch-{lock}", "stack-{lock}", "toolchain-{lock}", "{name}")


def write_predicates(
    record: Record,
    plan: ImagePlan,
    recipes: Recipes,
    *,
    registry: Registry,
    root: Path,
    env: Mapping[str, str],
) -> dict[str, Path]:
    """Write the provenance and the VEX; return every predicate of the image: kind -> file.

    Args:
        record: of the release.
        plan: of the image.
        recipes: of the plan.
        registry: of the recipes.
        root: the checkout.
        env: environment variables; those of GitHub name the builder.

    Raises:
        AttnimgError: an answer to a known vulnerability does not hold (code "no-vex").
    """
    name = plan.name
    files = {kind: root / path for kind, path in evidence(name).items()}
    locks = {}
    for pattern in _LOCKS:
        path = f"requirements/images/{pattern.format(lock=plan.lock, name=name)}.txt"
        if (text := read_if_exists(root / path)) is not None:
            locks[path] = text
    bake = json.loads(
        (root / "docker/docker-bake.json")
        .read_text(encoding="utf-8")
        .replace("${ARCH}", platform_suffix(plan.platform))
    )
    predicates = {
        "provenance": provenance(
            plan,
            targets=bake["target"],
            locks=locks,
            base={
                "name": record.labels.get(f"{OCI}.base.name") or plan.base.reference,
                "digest": record.labels.get(f"{OCI}.base.digest", ""),
            },
            image_id=record.image_id,
            source=registry.source,
            revision=record.revision,
            created=record.labels.get(f"{OCI}.created", ""),
            builder=find_builder(env),
            warnings=record.rehearsal,
        ),
        "vex": vex(
            recipes.cves,
            sbom=json.loads(files["cyclonedx"].read_text(encoding="utf-8")),
            repository=record.reference.partition("@")[0],
            digest=record.digest,
            author=registry.source,
            moment=record.started,
        ),
    }
    paths = {kind: f"{FOLDER}/{name}-{kind}.json" for kind in predicates}
    write_all(
        root, {paths[kind]: json.dumps(text, indent=1) + "\n" for kind, text in predicates.items()}
    )
    return files | {kind: root / path for kind, path in paths.items()}

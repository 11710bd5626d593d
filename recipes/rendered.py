"""Render every file that is generated from the recipes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

from attnimg.errors import AttnimgError
from attnimg.selection.images import parse
from attnimg.selection.model_types import read_causal_types
from recipes.facts import Plan, Recipes
from recipes.files import text_of
from recipes.gates import docs
from recipes.pages.api_page import api_page
from recipes.pages.checkpoints_page import checkpoints_page
from recipes.pages.choices import choices, choices_json
from recipes.pages.choices_page import choices_page
from recipes.pages.families_page import families_page
from recipes.pages.images_and_kernels import (
    fa4_models_page,
    gates_page,
    images_page,
    kernels_page,
    support_page,
)
from recipes.render.bake import bake_file
from recipes.render.images_json import catalogue
from recipes.render.matrix import matrix
from recipes.render.mounted import mounted_files
from recipes.render.precompiled import kernel_sets
from recipes.solve.lock import blocks


def rendered(
    plans: tuple[Plan, ...],
    recipes: Recipes,
    *,
    locks: Mapping[str, str],
    runners: str,
    families: str,
    reload: str,
) -> dict[str, str]:
    """Return every generated file: path -> text.

    Args:
        plans: of all images.
        recipes: what the plans were made from.
        locks: image -> text of its lock file.
        runners: text of recipes/runners.toml.
        families: text of the record of `make families`.
        reload: text of the record of `make test/reload`.

    Raises:
        AttnimgError: as refuse_wrong_hashes.
    """
    refuse_wrong_hashes(plans, locks=locks)
    ci = tomllib.loads(runners)
    images = catalogue(plans, stack=recipes.stack)
    parsed = parse(images)
    chosen = choices(parsed)
    texts = {
        "docker/docker-bake.json": bake_file(plans),
        "attnimg/data/images.json": images,
        ".github/matrix.json": matrix(plans, build_runner=ci["build"], gpu_runners=ci["gpu"]),
        "docs/api.md": api_page(),
        "docs/choices.md": choices_page(chosen),
        "docs/checkpoints.md": checkpoints_page(read_causal_types(), reloaded=reload),
        "tests/unit/golden/choices.json": choices_json(chosen, parsed),
        "docs/families.md": families_page(families),
        "docs/gates.md": gates_page(docs(), recipes.allowed),
        "docs/images.md": images_page(plans),
        "docs/kernels.md": kernels_page(recipes.kernels.values()),
        "docs/support.md": support_page(plans),
        **kernel_sets(plans),
    }
    for kernel in (kernel for kernel in recipes.kernels.values() if kernel.ahead_of_time):
        texts["docs/fa4-models.md"] = fa4_models_page(kernel)
    for plan in plans:
        texts |= mounted_files(plan, lock=locks[plan.image.name])
    return texts


def refuse_wrong_hashes(plans: tuple[Plan, ...], *, locks: Mapping[str, str]) -> None:
    """Check that the hash of each kernel that comes as a wheel is in its image's lock file.

    Sdists are compared where they are downloaded: at build time, before anything of them runs.

    Raises:
        AttnimgError: a hash is not among them (code "wrong-hash").
    """
    wrong = []
    for plan in plans:
        locked = blocks(locks[plan.image.name])
        for kernel in (step.kernel for step in plan.steps if step.kernel.form == "wheel"):
            text = locked.get(kernel.name, "")
            if isinstance(kernel.sha256, str) and f"sha256:{kernel.sha256}" not in text:
                wrong.append(f"{plan.image.name}: {kernel.source} has no file of {kernel.sha256}")
    if wrong:
        raise AttnimgError(
            "a kernel's sha256 is not that of its package",
            why="\n".join(wrong),
            do="write the hash of the file itself into recipes/kernels/, or make lock if it moved",
            code="wrong-hash",
        )


def drifted(texts: Mapping[str, str], *, root: Path) -> list[str]:
    """Return the generated files that differ from what the recipes say."""
    return [path for path, text in texts.items() if text_of(root / path) != text]

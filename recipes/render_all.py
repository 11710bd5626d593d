"""Render every file that is generated from the recipes."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.config.json_schema import config_schema
from attnimg.errors import AttnimgError
from attnimg.selection.gpus_and_images import parse_images
from attnimg.selection.model_types import read_causal_types
from recipes.facts import ImagePlan, Recipes, on_all_platforms
from recipes.files import generated_json, read_if_exists
from recipes.gates import all_gates
from recipes.pages.api_page import api_page
from recipes.pages.built import built_table
from recipes.pages.choices import choices_json, choices_page, choose_on_all_gpus
from recipes.pages.config_keys_page import config_keys_page
from recipes.pages.convert_keys_page import convert_keys_page
from recipes.pages.image_pages import (
    fa4_models_page,
    gates_page,
    images_page,
    kernels_page,
    support_page,
)
from recipes.pages.model_pages import checkpoints_page, families_page
from recipes.render.bake import bake_file
from recipes.render.image_lists import images_json, matrix_json
from recipes.render.mounted import mounted_files
from recipes.render.precompiled import kernel_sets
from recipes.solve.lock import split_lock


def render_files(
    plans: tuple[ImagePlan, ...],
    recipes: Recipes,
    *,
    locks: Mapping[str, str],
    runners: str,
    families: str,
    reload: str,
    config_keys: str,
    built: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """Return every generated file: path -> text.

    Args:
        plans: of all images.
        recipes: of the plans.
        locks: name of a plan, "hopper-arm64" -> text of its lock file.
        runners: text of recipes/runners.toml.
        families: text of the record of `make families`.
        reload: text of the record of `make test/reload`.
        config_keys: text of attnimg/data/config_keys.toml.
        built: image -> its record of `make built/NAME`.

    Raises:
        AttnimgError: as refuse_wrong_hashes and config_keys_page.
    """
    refuse_wrong_hashes(plans, locks=locks)
    images = images_json(plans, stack=recipes.stack, locks=locks)
    parsed = parse_images(images)
    gpu_choices = choose_on_all_gpus(parsed)
    texts = {
        "docker/docker-bake.json": bake_file(plans),
        "attnimg/data/images.json": images,
        "docs/api.md": api_page(),
        ".github/matrix.json": matrix_json(plans, runners=tomllib.loads(runners)),
        "docs/what-auto-chooses.md": choices_page(gpu_choices),
        "docs/checkpoints.md": checkpoints_page(read_causal_types(), reloaded=reload),
        "docs/config-keys.md": config_keys_page(config_keys),
        "docs/convert-keys.md": convert_keys_page(),
        "docs/attnimg.schema.json": generated_json(config_schema()),
        "tests/unit/golden/choices.json": choices_json(gpu_choices, parsed),
        "docs/model-types.md": families_page(families),
        "docs/gates.md": gates_page(all_gates(), recipes.allowed),
        "docs/images.md": images_page(plans, built=built_table(plans, built)),
        "docs/kernel-sources.md": kernels_page(recipes.kernels.values()),
        "docs/backends-by-image.md": support_page(plans),
        **kernel_sets(plans),
    }
    for kernel in (kernel for kernel in recipes.kernels.values() if kernel.ahead_of_time):
        texts["docs/precompiled-models.md"] = fa4_models_page(kernel)
    for plan in on_all_platforms(plans):
        texts |= mounted_files(plan, lock=locks[plan.name])
    return texts


def refuse_wrong_hashes(plans: tuple[ImagePlan, ...], *, locks: Mapping[str, str]) -> None:
    """Check that the hash of each kernel that comes as a wheel is in its image's lock file.

    Sdists are compared where they are downloaded: at build time, before anything of them runs.

    Raises:
        AttnimgError: a hash is not among them (code "wrong-hash").
    """
    wrong = []
    for plan in on_all_platforms(plans):
        locked = split_lock(locks[plan.name])
        for kernel in (step.kernel for step in plan.steps if step.kernel.form == "wheel"):
            text = locked.get(kernel.name, "")
            if isinstance(kernel.sha256, str) and f"sha256:{kernel.sha256}" not in text:
                wrong.append(f"{plan.name}: no file of {kernel.source} has {kernel.sha256}")
    if wrong:
        raise AttnimgError(
            "a kernel's sha256 is not that of its package",
            why="\n".join(wrong),
            do="write the hash of the file itself into recipes/kernels/, or make lock",
            code="wrong-hash",
        )


def outdated_files(texts: Mapping[str, str], *, root: Path) -> list[str]:
    """Return the generated files that differ from the files of a checkout."""
    return [path for path, text in texts.items() if read_if_exists(root / path) != text]

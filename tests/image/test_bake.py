"""The bake file that is rendered from the recipes, as the engine's own bake reads it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_image_of_the_recipes_is_a_target_that_bake_accepts() -> None:
    command = ["docker", "buildx", "bake", "-f", "docker/docker-bake.json", "--print"]
    done = subprocess.run(
        [*command, "all", "frontier"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    targets = json.loads(done.stdout)["target"]
    images = json.loads((ROOT / "attnimg/data/images.json").read_text())["images"]
    assert set(images) <= set(targets)
    assert all(f"attnimg:{name}" in targets[name]["tags"] for name in images)

"""Write CI's matrix: which images to build, and which GPU suites run on which runner."""

from __future__ import annotations

import json
from collections.abc import Mapping

from recipes.facts import Plan
from recipes.files import NOTICE
from recipes.solve.rules import device


def matrix(plans: tuple[Plan, ...], *, build_runner: str, gpu_runners: Mapping[str, str]) -> str:
    """Write .github/matrix.json.

    `images` has one entry per image and platform; `publish` is false while a value is unresolved.
    `gpu` has one entry per image and architecture; with a null runner the suite is skipped, and
    the skip is recorded.
    """
    images = [
        {
            "image": plan.image.name,
            "channel": plan.image.channel,
            "platform": platform,
            "runner": build_runner,
            "publish": not plan.unresolved,
        }
        for plan in plans
        for platform in plan.image.platforms
    ]
    gpu = [
        {"image": plan.image.name, "arch": device(arch), "runner": gpu_runners.get(device(arch))}
        for plan in plans
        if plan.image.accelerator != "cpu"
        for arch in plan.image.archs
    ]
    content = {"//": NOTICE, "images": images, "gpu": gpu}
    return json.dumps(content, indent=1) + "\n"

"""Write the lists of images: attnimg/data/images.json for attnimg, .github/matrix.json for CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.archs import device_name
from recipes.facts import ImagePlan, Step, Unresolved
from recipes.files import generated_json
from recipes.solve.lock import fixed_versions, pinned_versions

# Packages of single images that a rule of attnimg depends on, besides kernels.
_LISTED = ("liger-kernel",)


def images_json(
    plans: tuple[ImagePlan, ...], *, stack: Mapping[str, str], locks: Mapping[str, str]
) -> str:
    """Return every image: architectures, oldest driver, packages, kernels with their hashes.

    Args:
        plans: in the order of the file.
        stack: pinned packages that every image has.
        locks: image -> text of its lock file.
    """
    images = {plan.image.name: _image(plan, stack, lock=locks[plan.image.name]) for plan in plans}
    return generated_json({"images": images})


def _image(plan: ImagePlan, stack: Mapping[str, str], *, lock: str) -> dict[str, Any]:
    image = plan.image
    torch = _or_none(image.torch)
    packages = {**stack, **{step.kernel.name: step.kernel.version for step in plan.steps}}
    locked = pinned_versions(plan, lock=lock)
    packages |= {name: locked[name] for name in _LISTED if name in locked}
    if torch:
        packages["torch"] = torch
    return {
        "summary": image.summary,
        "aliases": list(image.aliases),
        "channel": image.channel,
        "archs": list(image.archs),
        "devices": [device_name(arch) for arch in image.archs],
        "platforms": list(image.platforms),
        "accelerator": image.accelerator,
        "python": image.python,
        "torch": torch,
        "toolkit": _or_none(plan.toolkit),
        "driver_min": _or_none(plan.driver_min),
        "abi": plan.abi,
        "packages": dict(sorted(packages.items())),
        "fixed": sorted(fixed_versions(plan, lock=lock)),
        "kernels": [_kernel(step) for step in plan.steps],
        "unresolved": dict(plan.unresolved),
    }


def _kernel(step: Step) -> dict[str, Any]:
    return {
        "name": step.kernel.name,
        "version": step.kernel.version,
        "source": step.kernel.source,
        "sha256": _or_none(step.kernel.sha256),
        "backends": list(step.kernel.backends),
        "devices": [device_name(arch) for arch in step.archs],
        "code": list(step.codes),
        "key": step.key,
    }


def _or_none(value: str | Unresolved | None) -> str | None:
    return None if isinstance(value, Unresolved) else value


def matrix_json(
    plans: tuple[ImagePlan, ...], *, build_runner: str, gpu_runners: Mapping[str, str]
) -> str:
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
        {
            "image": plan.image.name,
            "arch": device_name(arch),
            "runner": gpu_runners.get(device_name(arch)),
        }
        for plan in plans
        if plan.image.accelerator != "cpu"
        for arch in plan.image.archs
    ]
    return generated_json({"images": images, "gpu": gpu})

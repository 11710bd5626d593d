"""Write the lists of images: attnimg/data/images.json for attnimg, .github/matrix.json for CI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.archs import device_name
from recipes.facts import (
    ImagePlan,
    Step,
    Unresolved,
    on_all_platforms,
    platform_suffix,
    steps_and_platforms,
)
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
    packages = {**stack}
    packages |= {name: step.kernel.version for name, (step, _) in steps_and_platforms(plan).items()}
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
        "abi": {one.platform: one.abi for one in on_all_platforms([plan])},
        "packages": dict(sorted(packages.items())),
        "fixed": sorted(fixed_versions(plan, lock=lock)),
        "kernels": [_kernel(step, plan) for step, _ in steps_and_platforms(plan).values()],
        "unresolved": {
            key: reason
            for one in on_all_platforms([plan])
            for key, reason in one.unresolved.items()
        },
    }


def _kernel(step: Step, plan: ImagePlan) -> dict[str, Any]:
    """Return a kernel of an image; it is on the platforms for which it has a key."""
    keys = {
        one.platform: other.key
        for one in on_all_platforms([plan])
        for other in one.steps
        if other.kernel.name == step.kernel.name
    }
    return {
        "name": step.kernel.name,
        "version": step.kernel.version,
        "source": step.kernel.source,
        "sha256": _or_none(step.kernel.sha256),
        "backends": list(step.kernel.backends),
        "devices": [device_name(arch) for arch in step.archs],
        "code": list(step.codes),
        "keys": keys,
    }


def _or_none(value: str | Unresolved | None) -> str | None:
    return None if isinstance(value, Unresolved) else value


def matrix_json(plans: tuple[ImagePlan, ...], *, runners: Mapping[str, Any]) -> str:
    """Write .github/matrix.json.

    `images` has one entry per image and platform: `skip` is the reason why it can't be built yet,
    or empty; `publish` is false while a value is unresolved. `kernels` has one entry per kernel to
    compile, named by its key; `layers` one image of each torch that images share: both have the
    platform to build on. `gpu` has one entry per image and architecture; with a null runner the
    suite is skipped, and the skip is recorded.

    Args:
        plans: of all images.
        runners: the content of recipes/runners.toml.
    """
    images, gpu = [], []
    kernels: dict[tuple[str, str, str], dict[str, Any]] = {}
    layers: dict[str, dict[str, Any]] = {}
    for plan in on_all_platforms(plans):
        image = plan.image
        runner = runners["build"].get(f"{image.accelerator}{platform_suffix(plan.platform)}", {})
        skip = _why_not_built(plan, runner)
        machine = {
            "platform": plan.platform,
            "runner": runner.get("label"),
            "prepare": runner.get("prepare", False),
        }
        images.append(
            {
                "image": image.name,
                "channel": image.channel,
                "aliases": list(image.aliases),
                "skip": skip,
                "publish": not (skip or plan.unresolved),
                "kernels": any(step.kernel.form != "wheel" for step in plan.steps),
                **machine,
            }
        )
        if not skip:
            layers.setdefault(plan.lock, {"lock": plan.lock, "image": image.name, **machine})
            for step in plan.steps:
                if step.kernel.form != "wheel":
                    entry = {"image": image.name, "kernel": step.kernel.name, **machine}
                    kernels.setdefault((plan.lock, step.kernel.name, step.key), entry)
        if image.accelerator != "cpu" and plan.platform == image.platforms[0]:
            for arch in image.archs:
                label = runners.get("gpu", {}).get(device_name(arch))
                reason = skip or ("" if label else "no runner")
                gpu.append(
                    {
                        "image": image.name,
                        "arch": device_name(arch),
                        "runner": None if reason else label,
                        "skip": reason,
                    }
                )
    return generated_json(
        {
            "images": images,
            "layers": list(layers.values()),
            "kernels": list(kernels.values()),
            "gpu": gpu,
        }
    )


def _why_not_built(plan: ImagePlan, runner: Mapping[str, Any]) -> str:
    """Return why CI builds no image of a plan; empty if it does."""
    if isinstance(plan.image.torch, Unresolved):
        return plan.image.torch.reason
    for hashes in plan.cpu_torch.wheels.values() if plan.cpu_torch else ():
        if isinstance(hashes, Unresolved):
            return hashes.reason
    wanted = f"{plan.image.accelerator}{platform_suffix(plan.platform)}"
    return "" if runner else f"no runner in recipes/runners.toml for {wanted}"

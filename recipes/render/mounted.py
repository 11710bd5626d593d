"""Write the files that the Dockerfile mounts for one image: docker/images/NAME/, constraints.

For a platform other than the first, NAME ends with its CPU: docker/images/hopper-arm64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recipes.facts import ImagePlan, Step, Unresolved
from recipes.files import NOTICE, generated_json
from recipes.solve.lock import fixed_versions, pinned_versions
from recipes.solve.rocm import requirements


def mounted_files(plan: ImagePlan, *, lock: str) -> dict[str, str]:
    """Return the files of one image on one platform: path -> text.

    Args:
        plan: of the image.
        lock: the text of requirements/images/NAME.txt.
    """
    name = plan.name
    built = [step for step in plan.steps if step.kernel.form != "wheel"]
    wheelhouse = {
        "image": plan.image.name,
        "abi": plan.abi,
        "kernels": {step.kernel.name: step.key for step in built},
    }
    texts = {
        f"docker/constraints/{name}.txt": constraints(pinned_versions(plan, lock=lock)),
        f"docker/constraints/{name}-fixed.txt": constraints(fixed_versions(plan, lock=lock)),
        f"docker/images/{name}/wheelhouse.json": generated_json(wheelhouse),
    }
    if plan.cpu_torch:
        texts[f"docker/images/{name}/torch.json"] = generated_json(
            {
                "version": str(plan.image.torch),
                "python": plan.image.python,
                "platform": plan.platform,
                "index": plan.cpu_torch.index,
                "wheels": {
                    name: [] if isinstance(hashes, Unresolved) else list(hashes)
                    for name, hashes in plan.cpu_torch.wheels.items()
                },
                "unresolved": [
                    hashes.reason
                    for hashes in plan.cpu_torch.wheels.values()
                    if isinstance(hashes, Unresolved)
                ],
            }
        )
    if plan.rocm_torch:
        hashes = plan.rocm_torch.hashes
        known = {} if isinstance(hashes, Unresolved) else hashes
        texts[f"docker/images/{name}/rocm.json"] = generated_json(
            {
                "requirements": list(requirements(str(plan.image.torch), plan.rocm_torch)),
                "python": plan.image.python,
                "lock": plan.lock,
                "index": plan.rocm_torch.index,
                "hashes": {key: list(value) for key, value in known.items()},
                "unresolved": hashes.reason if isinstance(hashes, Unresolved) else "",
            }
        )
    for step in built:
        path = f"docker/images/{name}/kernels/{step.kernel.name}.json"
        texts[path] = generated_json(kernel_build(step))
    return texts


def kernel_build(step: Step) -> dict[str, Any]:
    """Return the settings of the build of one kernel; docker/kernel/source.py explains them."""
    kernel, wheel = step.kernel, step.prebuilt
    sha256 = wheel.sha256 if wheel else kernel.sha256
    return {
        "name": kernel.name,
        "version": kernel.version,
        "key": step.key,
        "archs": list(step.archs),
        "source": kernel.source if kernel.form == "sdist" else "",
        "sha256": sha256 if isinstance(sha256, str) else "",
        "prebuilt": wheel.source if wheel else "",
        "directory": kernel.subdirectory,
        "remove": [removal.path for removal in kernel.remove],
        "arch_variable": step.build.arch_variable,
        "tokens": list(step.tokens),
        "env": dict(step.build.env),
        "trim_env": dict(kernel.trim.env) if kernel.trim else {},
        "job_memory_gb": step.build.job_memory_gb,
    }


def constraints(versions: Mapping[str, str]) -> str:
    """Return a file of constraints for pip and uv."""
    lines = (f"{name}=={versions[name]}" for name in sorted(versions))
    return "\n".join([f"# {NOTICE}", *lines]) + "\n"

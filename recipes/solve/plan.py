"""Plan an image from its recipe; if it can't be built, raise all reasons and the nearest fix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from graphlib import TopologicalSorter

from attnimg.errors import AttnimgError
from recipes.facts import (
    Base,
    CpuBuild,
    Image,
    ImageKernel,
    ImagePlan,
    Kernel,
    Platform,
    Prebuilt,
    Recipes,
    Step,
    Unresolved,
    platform_suffix,
)
from recipes.solve.nearest import nearest_buildable
from recipes.solve.rules import (
    cpu_wheels,
    cuda_release,
    kernel_archs,
    on_platform,
    reasons_against,
)


def solve(image: Image, recipes: Recipes) -> ImagePlan:
    """Plan one image for its first platform; the plan's `others` are those for the rest.

    Raises:
        AttnimgError: it can't be built; `why` has every reason, `do` the nearest that works.
    """
    if reasons := reasons_against(image, recipes):
        raise AttnimgError(
            f"the image {image.name} can't be built",
            why="\n".join(reasons),
            do=nearest_buildable(image, recipes),
            code="no-solution",
        )
    first, *others = (_plan(image, recipes, platform) for platform in image.platforms)
    return replace(first, others=tuple(others))


def _plan(image: Image, recipes: Recipes, platform: Platform) -> ImagePlan:
    """Plan an image that can be built, for one platform."""
    base, suffix = recipes.bases[image.base], platform_suffix(platform)
    toolkit, driver_min = _toolkit_and_driver(image, recipes)
    flavour = f"cu{toolkit.replace('.', '')}" if isinstance(toolkit, str) else image.accelerator
    abi = _abi(image, flavour) + suffix
    steps = tuple(
        _step(image, image_kernel, recipes, abi=abi, platform=platform)
        for image_kernel in _sort_kernels(on_platform(image, platform), recipes)
    )
    cpu_torch = _cpu_torch(image, recipes, platform)
    unresolved = _find_unresolved(image, steps, base, toolkit=toolkit, driver_min=driver_min)
    for name, hashes in (cpu_torch.wheels if cpu_torch else {}).items():
        if isinstance(hashes, Unresolved):
            unresolved[f"torch/{image.torch}: {name}"] = hashes.reason
    return ImagePlan(
        image=image,
        platform=platform,
        name=f"{image.name}{suffix}",
        steps=steps,
        unresolved=unresolved,
        abi=abi,
        lock=f"{image.torch}-{flavour}{suffix}",
        base=base,
        cpu_torch=cpu_torch,
        toolkit=toolkit,
        driver_min=driver_min,
        nvcc=recipes.cuda[toolkit].nvcc if isinstance(toolkit, str) else "",
    )


def solve_all(recipes: Recipes) -> tuple[ImagePlan, ...]:
    """Plan every image, stable ones first.

    Raises:
        AttnimgError: as solve, for the first one that can't be built; or images differ in their
            base image, which is one build context for all.
    """
    if len(bases := {image.base for image in recipes.images.values()}) > 1:
        raise AttnimgError(
            "images have different bases",
            why="\n".join(f"found {base}" for base in sorted(bases)),
            do="set the same base in every file of recipes/images",
            code="bases-differ",
        )
    plans = [solve(image, recipes) for image in recipes.images.values()]
    return tuple(sorted(plans, key=lambda plan: (plan.image.channel != "stable", plan.image.name)))


def refuse_unresolved(plan: ImagePlan) -> None:
    """Raise if a plan has unresolved values, which must not be published.

    Raises:
        AttnimgError: a value is unresolved (code "unresolved").
    """
    if plan.unresolved:
        raise AttnimgError(
            f"the image {plan.image.name} can't be published",
            why="\n".join(f"{key} is unresolved: {why}" for key, why in plan.unresolved.items()),
            do="find these values out, write them into recipes/, and make render",
            code="unresolved",
        )


def cache_key(
    kernel: Kernel, archs: tuple[str, ...], *, abi: str, env: Mapping[str, str] | None = None
) -> str:
    """Return the key of a kernel's wheel: the hash of all inputs of its build, and of nothing else.

    A change of a reason's text, of another image's architectures or of the small build must not
    cause hours of compiling.

    Args:
        kernel: its recipe.
        archs: what it is built for; their order does not matter.
        abi: what the machine code is bound to.
        env: its build environment.
    """
    recipe = {
        "source": [
            kernel.version,
            kernel.source,
            str(kernel.sha256),
            kernel.subdirectory,
            list(kernel.paths),
        ],
        "submodules": dict(kernel.submodules),
        "removed": [removal.path for removal in kernel.remove],
        "patches": [patch.diff for patch in kernel.patches if not patch.name.startswith("trim/")],
        "archs": {arch: [kernel.archs[arch].token, kernel.archs[arch].code] for arch in archs},
        "abi": abi,
        "env": dict(env or {}),
    }
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _step(
    image: Image, image_kernel: ImageKernel, recipes: Recipes, *, abi: str, platform: Platform
) -> Step:
    kernel = recipes.kernels[image_kernel.name]
    archs = kernel_archs(image, image_kernel)
    build = kernel.build[image.accelerator]
    tokens = _unique(kernel.archs[arch].token for arch in archs)
    arch_env = {build.arch_variable: ";".join(tokens)} if build.arch_variable else {}
    bound_to = "" if kernel.abi == "python" else abi
    codes = _unique(kernel.archs[arch].code for arch in archs)
    return Step(
        kernel=kernel,
        archs=archs,
        tokens=tokens,
        codes=codes,
        build=build,
        prebuilt=_find_prebuilt(kernel, codes, abi=abi, platform=platform),
        key=cache_key(kernel, archs, abi=bound_to, env={**build.env, **arch_env}),
    )


def _find_prebuilt(
    kernel: Kernel, codes: tuple[str, ...], *, abi: str, platform: Platform
) -> Prebuilt | None:
    """Return a public wheel with exactly this machine code, torch, CUDA and Python; or None."""
    for wheel in kernel.prebuilt:
        fits = wheel.platform == platform and wheel.abi in ("", abi)
        if fits and set(wheel.codes) == set(codes):
            return wheel
    return None


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    """Return each text once, in order, without empty ones."""
    return tuple(dict.fromkeys(text for text in texts if text))


def _sort_kernels(image: Image, recipes: Recipes) -> list[ImageKernel]:
    """Return the kernels, each after those it needs and those whose files it owns."""
    image_kernels = {image_kernel.name: image_kernel for image_kernel in image.kernels}
    graph: dict[str, set[str]] = {name: set() for name in sorted(image_kernels)}
    for name in image_kernels:
        kernel = recipes.kernels[name]
        graph[name] |= {need.kernel for need in kernel.needs} & set(image_kernels)
        for other in set(image_kernels) - {name}:
            if set(kernel.owns) & set(recipes.kernels[other].ships):
                graph[name].add(other)
    return [image_kernels[name] for name in TopologicalSorter(graph).static_order()]


def _cpu_torch(image: Image, recipes: Recipes, platform: Platform) -> CpuBuild | None:
    """Return the CPU build of an image's torch, with the wheels for its Python and a platform."""
    torch = recipes.torch.get(str(image.torch))
    if image.accelerator != "cpu" or torch is None or torch.cpu is None:
        return None
    names = cpu_wheels(torch, image.python, platform)
    return replace(torch.cpu, wheels={name: torch.cpu.wheels[name] for name in names})


def _toolkit_and_driver(
    image: Image, recipes: Recipes
) -> tuple[str | Unresolved | None, str | Unresolved | None]:
    """Return the CUDA release of an image's torch and its oldest driver; None on cpu."""
    if image.accelerator == "cpu":
        return None, None
    if release := cuda_release(image, recipes):
        return release, recipes.cuda[release].driver_min
    return Unresolved("follows from torch's build"), Unresolved("follows from the ROCm release")


def _abi(image: Image, flavour: str) -> str:
    python = f"cp{image.python.replace('.', '')}"
    if isinstance(image.torch, Unresolved):
        return f"{python}-torch-{image.torch}"
    minor = ".".join(image.torch.split(".")[:2])
    return f"{python}-torch{minor}-{flavour}"


def _find_unresolved(
    image: Image, steps: tuple[Step, ...], base: Base, **computed: object
) -> dict[str, str]:
    """Return the unresolved values of an image, base, kernels and `computed`: key -> reason."""
    values: dict[str, object] = {item.name: getattr(image, item.name) for item in fields(image)}
    found = {f"images/{image.name}: {key}": value for key, value in (values | computed).items()}
    found[f"bases/{base.name}: digest"] = base.digest
    found |= {f"kernels/{step.kernel.name}: sha256": step.kernel.sha256 for step in steps}
    return {key: value.reason for key, value in found.items() if isinstance(value, Unresolved)}

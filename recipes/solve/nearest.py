"""Find the nearest image that can be built: try small changes, the smallest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

from packaging.version import InvalidVersion, Version

from recipes.facts import Image, ImageKernel, Recipes
from recipes.solve.rules import reasons_against

# The cost of each kind of change, for the order of candidates: adding a kernel is the smallest
# change, then another torch; removing a GPU architecture is the largest.
_ADD, _TORCH, _DROP, _NARROW, _ARCH = 1, 2, 4, 3, 8


def nearest(image: Image, recipes: Recipes) -> str:
    """Return which changes make an image buildable, in a sentence that begins with "nearest:"."""
    for _, changes, candidate in sorted(_candidates(image, recipes), key=lambda found: found[:2]):
        if not reasons_against(candidate, recipes):
            return f"nearest: {', '.join(changes)}"
    return (
        "nearest: none by changing torch, kernels or architectures; copy a file of recipes/images"
    )


def _candidates(image: Image, recipes: Recipes) -> Iterator[tuple[int, list[str], Image]]:
    """Yield (cost, changes, image) for each combination of changes."""
    options = product(
        _torch_options(image, recipes), _kernel_options(image, recipes), _arch_options(image)
    )
    for (cost_t, changes_t, torch), (cost_k, changes_k, kernels), (
        cost_a,
        changes_a,
        archs,
    ) in options:
        kept = tuple(
            replace(choice, archs=tuple(arch for arch in choice.archs if arch in archs))
            for choice in kernels
            if not choice.archs or set(choice.archs) & set(archs)
        )
        candidate = replace(image, kernels=kept, archs=archs, **torch)
        yield cost_t + cost_k + cost_a, [*changes_t, *changes_k, *changes_a], candidate


def _torch_options(
    image: Image, recipes: Recipes
) -> Iterator[tuple[int, list[str], dict[str, Any]]]:
    yield 0, [], {}
    if not isinstance(image.torch, str):
        return
    versions = list(recipes.torch)
    here = sum(_before(version, image.torch) for version in versions)
    for place, version in enumerate(versions):
        if version == image.torch:
            continue
        change = f"torch {version}"
        toolkit = recipes.torch[version].toolkit
        if image.accelerator == "cuda" and toolkit in recipes.cuda:
            change += f" with CUDA {toolkit} (driver {recipes.cuda[toolkit].driver_min} or newer)"
        yield _TORCH + abs(place - here), [change], {"torch": version}


def _before(version: str, other: str) -> bool:
    try:
        return Version(version) < Version(other)
    except InvalidVersion:
        return False


def _kernel_options(
    image: Image, recipes: Recipes
) -> Iterator[tuple[int, list[str], tuple[ImageKernel, ...]]]:
    """Yield the kernels with up to three removed, and with those added that others need."""
    names = [choice.name for choice in image.kernels]
    needed = {
        n.kernel for name in names if name in recipes.kernels for n in recipes.kernels[name].needs
    }
    for count in range(min(len(names), 3) + 1):
        for dropped in combinations(range(len(names)), count):
            kept = tuple(c for place, c in enumerate(image.kernels) if place not in dropped)
            changes = [f"without {names[place]}" for place in dropped]
            yield _DROP * count, changes, kept
            for extra in sorted(needed - set(names)):
                yield (
                    _DROP * count + _ADD,
                    [*changes, f"with {extra}"],
                    (*kept, ImageKernel(name=extra)),
                )
    yield from _limit_kernels(image, recipes)


def _limit_kernels(
    image: Image, recipes: Recipes
) -> Iterator[tuple[int, list[str], tuple[ImageKernel, ...]]]:
    """Yield the kernels with one of them limited to the architectures that it supports."""
    for place, choice in enumerate(image.kernels):
        has = recipes.kernels[choice.name].archs if choice.name in recipes.kernels else {}
        archs = tuple(arch for arch in image.archs if arch in has)
        if archs and archs != (choice.archs or image.archs):
            kernels = list(image.kernels)
            kernels[place] = ImageKernel(name=choice.name, archs=archs)
            yield _NARROW, [f"{choice.name} for {' '.join(archs)} only"], tuple(kernels)


def _arch_options(image: Image) -> Iterator[tuple[int, list[str], tuple[str, ...]]]:
    yield 0, [], image.archs
    for count in range(1, len(image.archs)):
        for dropped in combinations(image.archs, count):
            kept = tuple(arch for arch in image.archs if arch not in dropped)
            yield _ARCH * count, [f"without {arch}" for arch in dropped], kept

"""Find the nearest image that can be built: try small changes, the smallest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any, NamedTuple

from packaging.version import InvalidVersion, Version

from recipes.facts import Image, ImageKernel, Recipes
from recipes.solve.rules import reasons_against

# The cost of each kind of change, for the order of candidates: adding a kernel is the smallest
# change, then another torch; removing a platform or a GPU architecture is the largest.
_ADD, _TORCH, _DROP, _NARROW, _PLATFORM, _ARCH = 1, 2, 4, 3, 7, 8


class _Change(NamedTuple):
    """Other values for fields of an image, with their cost and a description of each."""

    cost: int
    texts: list[str]
    values: Mapping[str, Any]


_NONE = _Change(0, [], {})


def nearest_buildable(image: Image, recipes: Recipes) -> str:
    """Return which changes make an image buildable, in a sentence that begins with "nearest:"."""
    for change in sorted(_changes(image, recipes), key=lambda change: change[:2]):
        if not reasons_against(replace(image, **change.values), recipes):
            return f"nearest: {', '.join(change.texts)}"
    return (
        "nearest: none by changing torch, kernels, platforms or architectures; copy a file of "
        "recipes/images"
    )


def _changes(image: Image, recipes: Recipes) -> Iterator[_Change]:
    """Yield each combination of changes: of torch, kernels, platforms and architectures."""
    for changes in product(
        _change_torch(image, recipes),
        _change_kernels(image, recipes),
        _change_platforms(image),
        _change_archs(image),
    ):
        values = {key: value for change in changes for key, value in change.values.items()}
        archs = values.get("archs", image.archs)
        platforms = values.get("platforms", image.platforms)
        values["kernels"] = tuple(
            replace(
                kernel,
                archs=tuple(arch for arch in kernel.archs if arch in archs),
                platforms=tuple(one for one in kernel.platforms if one in platforms),
            )
            for kernel in values.get("kernels", image.kernels)
            if not (kernel.archs and set(archs).isdisjoint(kernel.archs))
            and not (kernel.platforms and set(platforms).isdisjoint(kernel.platforms))
        )
        cost = sum(change.cost for change in changes)
        yield _Change(cost, [text for change in changes for text in change.texts], values)


def _change_torch(image: Image, recipes: Recipes) -> Iterator[_Change]:
    yield _NONE
    if not isinstance(image.torch, str):
        return
    versions = list(recipes.torch)
    own_place = sum(_is_older(version, image.torch) for version in versions)
    for place, version in enumerate(versions):
        if version == image.torch:
            continue
        text = f"torch {version}"
        toolkit = recipes.torch[version].toolkit
        if image.accelerator == "cuda" and toolkit in recipes.cuda:
            text += f" with CUDA {toolkit} (driver {recipes.cuda[toolkit].driver_min} or newer)"
        yield _Change(_TORCH + abs(place - own_place), [text], {"torch": version})


def _is_older(version: str, other: str) -> bool:
    try:
        return Version(version) < Version(other)
    except InvalidVersion:
        return False


def _change_kernels(image: Image, recipes: Recipes) -> Iterator[_Change]:
    """Remove up to three kernels, add one that others need, or limit one to what it supports."""
    known = [recipes.kernels[k.name] for k in image.kernels if k.name in recipes.kernels]
    needed = {need.kernel for kernel in known for need in kernel.needs}
    addable = sorted(needed - {kernel.name for kernel in image.kernels})
    for count in range(min(len(image.kernels), 3) + 1):
        for dropped in combinations(range(len(image.kernels)), count):
            kept = tuple(k for place, k in enumerate(image.kernels) if place not in dropped)
            texts = [f"without {image.kernels[place].name}" for place in dropped]
            yield _Change(_DROP * count, texts, {"kernels": kept})
            for name in addable:
                kernels = (*kept, ImageKernel(name=name))
                yield _Change(_DROP * count + _ADD, [*texts, f"with {name}"], {"kernels": kernels})
    for place, kernel in enumerate(image.kernels):
        recipe = recipes.kernels.get(kernel.name)
        if recipe is None:
            continue
        archs = tuple(arch for arch in image.archs if arch in recipe.archs)
        platforms = tuple(one for one in image.platforms if one in recipe.platforms)
        limited: list[tuple[ImageKernel, tuple[str, ...]]] = []
        if archs and archs != (kernel.archs or image.archs):
            limited.append((replace(kernel, archs=archs), archs))
        if platforms and platforms != (kernel.platforms or image.platforms):
            limited.append((replace(kernel, platforms=platforms), platforms))
        for other, left in limited:
            kernels = (*image.kernels[:place], other, *image.kernels[place + 1 :])
            text = f"{kernel.name} for {' '.join(left)} only"
            yield _Change(_NARROW, [text], {"kernels": kernels})


def _change_platforms(image: Image) -> Iterator[_Change]:
    yield _NONE
    for dropped in image.platforms if len(image.platforms) > 1 else ():
        kept = tuple(platform for platform in image.platforms if platform != dropped)
        yield _Change(_PLATFORM, [f"without {dropped}"], {"platforms": kept})


def _change_archs(image: Image) -> Iterator[_Change]:
    yield _NONE
    for count in range(1, len(image.archs)):
        for dropped in combinations(image.archs, count):
            kept = tuple(arch for arch in image.archs if arch not in dropped)
            yield _Change(_ARCH * count, [f"without {arch}" for arch in dropped], {"archs": kept})

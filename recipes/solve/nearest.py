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
# change, then another torch; removing a GPU architecture is the largest.
_ADD, _TORCH, _DROP, _NARROW, _ARCH = 1, 2, 4, 3, 8


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
        "nearest: none by changing torch, kernels or architectures; copy a file of recipes/images"
    )


def _changes(image: Image, recipes: Recipes) -> Iterator[_Change]:
    """Yield each combination of a change of torch, one of kernels and one of architectures."""
    for torch, kernels, archs in product(
        _change_torch(image, recipes), _change_kernels(image, recipes), _change_archs(image)
    ):
        values = {**torch.values, **kernels.values, **archs.values}
        left = set(values.get("archs", image.archs))
        values["kernels"] = tuple(
            replace(kernel, archs=tuple(arch for arch in kernel.archs if arch in left))
            for kernel in values.get("kernels", image.kernels)
            if not kernel.archs or left & set(kernel.archs)
        )
        cost = torch.cost + kernels.cost + archs.cost
        yield _Change(cost, [*torch.texts, *kernels.texts, *archs.texts], values)


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
    """Remove up to three kernels, add one that others need, or limit one to its architectures."""
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
        supported = recipes.kernels[kernel.name].archs if kernel.name in recipes.kernels else {}
        archs = tuple(arch for arch in image.archs if arch in supported)
        if archs and archs != (kernel.archs or image.archs):
            limited = ImageKernel(name=kernel.name, archs=archs)
            kernels = (*image.kernels[:place], limited, *image.kernels[place + 1 :])
            text = f"{kernel.name} for {' '.join(archs)} only"
            yield _Change(_NARROW, [text], {"kernels": kernels})


def _change_archs(image: Image) -> Iterator[_Change]:
    yield _NONE
    for count in range(1, len(image.archs)):
        for dropped in combinations(image.archs, count):
            kept = tuple(arch for arch in image.archs if arch not in dropped)
            yield _Change(_ARCH * count, [f"without {arch}" for arch in dropped], {"archs": kept})

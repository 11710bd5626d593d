"""Everything that can be wrong with an image: each rule gives its reasons, with found and needed.

A bound on a value that is still unresolved is not judged: publishing refuses such an image anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.version import Version

from attnimg.facts import Reason
from attnimg.select.gpus import arch_from_name
from recipes.facts import Image, Recipes, Unresolved
from recipes.gates import gate_names
from recipes.kernel_rules import device, reasons_against_kernel, served, within

_SM = re.compile(r"sm_([0-9]+)([0-9])[af]?")


def reasons_against(image: Image, recipes: Recipes) -> tuple[Reason, ...]:
    """Give every reason why an image can't be built; none means that it can."""
    found = [*_names(image, recipes), *_platform(image, recipes), *_stack(recipes)]
    for choice in image.kernels:
        if choice.name in recipes.kernels:
            found += reasons_against_kernel(image, choice, recipes)
    found += _unserved(image)
    return tuple(found)


def _names(image: Image, recipes: Recipes) -> Iterator[Reason]:
    for choice in image.kernels:
        if choice.name not in recipes.kernels:
            known = ", ".join(sorted(recipes.kernels))
            yield Reason(
                code="unknown-kernel", text=f"found kernel {choice.name!r}; known: {known}"
            )
        for arch in set(choice.archs) - set(image.archs):
            text = f"{choice.name} is to serve {arch}, which {image.name} does not promise"
            yield Reason(code="arch-not-promised", text=text)
    names = [choice.name for choice in image.kernels]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Reason(code="kernel-twice", text=f"found {name} twice in kernels")
    for gate in image.gates:
        if gate not in gate_names():
            text = f"found gate {gate!r}; known: {', '.join(sorted(gate_names()))}"
            yield Reason(code="unknown-gate", text=text)


def _platform(image: Image, recipes: Recipes) -> Iterator[Reason]:
    """Judge torch, toolkit, driver, Python and architectures among themselves."""
    vendors = {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd"}
    for arch in image.archs:
        if arch_from_name(device(arch)).vendor != vendors[image.accelerator]:
            text = f"found {arch} in an image for {image.accelerator}"
            yield Reason(code="arch-accelerator", text=text)
    if isinstance(image.torch, Unresolved):
        return
    torch = recipes.torch.get(image.torch)
    if torch is None:
        text = (
            f"torch {image.torch} is not in recipes/torch.toml; known: {', '.join(recipes.torch)}"
        )
        yield Reason(code="unknown-torch", text=text)
    elif not within(image.python, torch.python):
        text = f"torch {image.torch} needs Python {torch.python}; found {image.python}"
        yield Reason(code="torch-python", text=text)
    if image.accelerator == "cuda":
        yield from _cuda(image, recipes)


def _cuda(image: Image, recipes: Recipes) -> Iterator[Reason]:
    torch = recipes.torch.get(str(image.torch))
    if torch and image.toolkit != torch.toolkit:
        text = f"torch {image.torch} is built with CUDA {torch.toolkit}; found {image.toolkit}"
        yield Reason(code="torch-toolkit", text=text)
    toolkit = recipes.cuda.get(str(image.toolkit))
    if toolkit is None:
        text = f"CUDA {image.toolkit} is not in recipes/cuda.toml; known: {', '.join(recipes.cuda)}"
        yield Reason(code="unknown-toolkit", text=text)
        return
    if isinstance(image.driver_min, str) and Version(image.driver_min) < Version(
        toolkit.driver_min
    ):
        text = (
            f"CUDA {image.toolkit} needs driver {toolkit.driver_min} or newer; "
            f"found driver_min {image.driver_min}"
        )
        yield Reason(code="driver-floor", text=text)
    if image.driver_min is None:
        text = (
            f"CUDA {image.toolkit} needs driver {toolkit.driver_min} or newer; found no driver_min"
        )
        yield Reason(code="driver-floor", text=text)
    for arch in image.archs:
        if arch not in toolkit.archs:
            text = f"CUDA {image.toolkit} compiles for {' '.join(toolkit.archs)}; found {arch}"
            yield Reason(code="toolkit-arch", text=text)
        if torch and torch.archs and not _runs(arch, torch.archs):
            text = f"torch {image.torch} has machine code for {' '.join(torch.archs)}; found {arch}"
            yield Reason(code="torch-arch", text=text)


def _stack(recipes: Recipes) -> Iterator[Reason]:
    """Judge the packages that every image has among themselves."""
    for pair in recipes.pairs:
        here, other = recipes.stack.get(pair.package), recipes.stack.get(pair.needs)
        if here and other and within(here, pair.versions) and not within(other, pair.bound):
            text = f"{pair.package} {here} works with {pair.needs} {pair.bound}; found {other}"
            yield Reason(code="stack-pair", text=text)


def _runs(arch: str, codes: tuple[str, ...]) -> bool:
    """Tell whether a device runs one of these codes: same major, and no newer minor."""
    here = _SM.fullmatch(arch)
    return here is not None and any(
        (code := _SM.fullmatch(text)) is not None and code[1] == here[1] and code[2] <= here[2]
        for text in codes
    )


def _unserved(image: Image) -> Iterator[Reason]:
    """Find promised architectures that no kernel of the image serves."""
    if image.accelerator == "cpu":
        return
    for arch in image.archs:
        if not any(arch in served(image, choice) for choice in image.kernels):
            text = f"{image.name} promises {arch}; none of its kernels serves it"
            yield Reason(code="arch-unserved", text=text)

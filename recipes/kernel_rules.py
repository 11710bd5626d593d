"""What can be wrong with one kernel in an image: versions, architectures, backends, company."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from attnimg.backends import backend_named, runs_on
from attnimg.facts import Reason
from attnimg.select.gpus import arch_from_name
from recipes.facts import Choice, Image, Kernel, Recipes, Unresolved


def reasons_against_kernel(image: Image, choice: Choice, recipes: Recipes) -> Iterator[Reason]:
    """Give every reason why a kernel that has a recipe can't be part of an image."""
    kernel = recipes.kernels[choice.name]
    yield from _versions(image, kernel, recipes)
    yield from _archs(image, kernel, choice)
    yield from _backends(image, kernel, choice)
    yield from _company(image, kernel, recipes)


def served(image: Image, choice: Choice) -> tuple[str, ...]:
    """Give the architectures that a kernel has to serve in an image."""
    return choice.archs or image.archs


def device(arch: str) -> str:
    """Give the device that a compiler target is for: sm_90a is machine code for sm_90."""
    return re.sub(r"(?<=\d)[af]$", "", arch) if arch.startswith("sm_") else arch


def within(version: str, bound: str) -> bool:
    """Tell whether a version, a pre-release too, is within a bound."""
    return SpecifierSet(bound).contains(version, prereleases=True)


def _versions(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[Reason]:
    label = f"{kernel.name} {kernel.version}"
    if not within(image.python, kernel.python):
        text = f"{label} needs Python {kernel.python}; found {image.python}"
        yield Reason(code="kernel-python", text=text)
    if isinstance(image.torch, Unresolved):
        return
    if not within(image.torch, kernel.torch):
        text = f"{label} needs torch {kernel.torch}; found {image.torch}"
        yield Reason(code="kernel-torch", text=text)
    torch = recipes.torch.get(image.torch)
    # Stable-ABI headers do not include those that ask for a newer C++.
    if torch and kernel.abi == "torch" and (kernel.cxx_standard or 0) < torch.cxx_standard:
        text = (
            f"torch {image.torch}'s headers need C++{torch.cxx_standard}; "
            f"{label} is compiled as C++{kernel.cxx_standard}"
        )
        yield Reason(code="kernel-cxx", text=text)
    toolkit = recipes.cuda.get(str(image.toolkit))
    if toolkit and kernel.nvcc and not within(toolkit.nvcc, kernel.nvcc):
        text = f"{label} needs nvcc {kernel.nvcc}; found {toolkit.nvcc} of CUDA {image.toolkit}"
        yield Reason(code="kernel-nvcc", text=text)


def _archs(image: Image, kernel: Kernel, choice: Choice) -> Iterator[Reason]:
    if image.accelerator not in kernel.build:
        text = f"{kernel.name} is built on {' '.join(kernel.build)}; found {image.accelerator}"
        yield Reason(code="kernel-accelerator", text=text)
    for arch in served(image, choice):
        if arch not in kernel.archs:
            has = " ".join(kernel.archs)
            text = f"{kernel.name} {kernel.version} serves {has}; found {arch}"
            yield Reason(code="kernel-arch", text=text)


def _backends(image: Image, kernel: Kernel, choice: Choice) -> Iterator[Reason]:
    """Refuse a kernel whose backend can't run where the image promises it."""
    for name in kernel.backends:
        backend = backend_named(name)
        if backend is None:
            yield Reason(code="unknown-backend", text=f"{kernel.name} serves unknown {name!r}")
            continue
        for arch in served(image, choice):
            if not runs_on(backend.needs, arch_from_name(device(arch))):
                text = f"backend {name} needs {backend.needs.arch_text}; found {arch}"
                yield Reason(code="backend-arch", text=text)


def _company(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[Reason]:
    """Judge a kernel beside the others and beside the pinned stack."""
    names = {choice.name for choice in image.kernels}
    label = f"{kernel.name} {kernel.version}"
    versions = dict(recipes.stack)
    versions |= {n: recipes.kernels[n].version for n in names & set(recipes.kernels)}
    for other, bound in kernel.beside.items():
        if other in versions and not within(versions[other], bound):
            text = f"{label} needs {other} {bound} beside it; found {versions[other]}"
            yield Reason(code="kernel-beside", text=text)
    for need in kernel.needs:
        if need.kernel not in names and need.beside in names | {""}:
            beside = f" beside {need.beside}" if need.beside else ""
            text = f"{label} needs {need.kernel}{beside}; found none: {need.reason}"
            yield Reason(code="kernel-needs", text=text)
    removed = {removal.path for removal in kernel.remove}
    for name in sorted(names - {kernel.name}):
        owner = recipes.kernels.get(name)
        for path in owner.owns if owner else ():
            if path in kernel.ships and path not in removed:
                text = f"{label} installs {path}, which {name} owns; needed: to remove it"
                yield Reason(code="kernel-shadow", text=text)

"""Find all reasons why an image can't be built, each with what was found and needed.

A bound on an unresolved value is not checked: publishing refuses such an image anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from attnimg.backends import backend_named, runs_on
from attnimg.facts import Reason
from attnimg.select.gpus import arch_from_name
from recipes.facts import Image, ImageKernel, Kernel, Recipes, Unresolved

_SM = re.compile(r"sm_([0-9]+)([0-9])[af]?")


def reasons_against(image: Image, recipes: Recipes) -> tuple[Reason, ...]:
    """Return every reason why an image can't be built; none means that it can."""
    found = [
        *_check_names(image, recipes),
        *_check_platform(image, recipes),
        *_check_stack(recipes),
    ]
    for choice in image.kernels:
        if choice.name in recipes.kernels:
            found += reasons_against_kernel(image, choice, recipes)
    found += _check_coverage(image)
    return tuple(found)


def _check_names(image: Image, recipes: Recipes) -> Iterator[Reason]:
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


def _check_platform(image: Image, recipes: Recipes) -> Iterator[Reason]:
    """Check base, torch, its CUDA release, Python and architectures against one another."""
    if image.base not in recipes.bases:
        known = ", ".join(recipes.bases)
        text = f"base {image.base} is not in recipes/bases.toml; known: {known}"
        yield Reason(code="unknown-base", text=text)
    vendors = {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd"}
    for arch in image.archs:
        if arch_from_name(device_name(arch)).vendor != vendors[image.accelerator]:
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
    elif not satisfies(image.python, torch.python):
        text = f"torch {image.torch} needs Python {torch.python}; found {image.python}"
        yield Reason(code="torch-python", text=text)
    if image.accelerator == "cuda":
        yield from _check_cuda(image, recipes)


def cuda_release(image: Image, recipes: Recipes) -> str | None:
    """Return the CUDA release of an image's torch; None if that is not known, or not CUDA."""
    torch = recipes.torch.get(str(image.torch)) if image.accelerator == "cuda" else None
    return torch.toolkit if torch else None


def _check_cuda(image: Image, recipes: Recipes) -> Iterator[Reason]:
    torch = recipes.torch.get(str(image.torch))
    if torch is None:
        return
    toolkit = recipes.cuda.get(torch.toolkit)
    if toolkit is None:
        known = ", ".join(recipes.cuda)
        release = f"CUDA {torch.toolkit} of torch {image.torch}"
        text = f"{release} is not in recipes/cuda.toml; known: {known}"
        yield Reason(code="unknown-toolkit", text=text)
        return
    for arch in image.archs:
        if arch not in toolkit.archs:
            text = f"CUDA {torch.toolkit} compiles for {' '.join(toolkit.archs)}; found {arch}"
            yield Reason(code="toolkit-arch", text=text)
        if torch.archs and not _runs(arch, torch.archs):
            text = f"torch {image.torch} has machine code for {' '.join(torch.archs)}; found {arch}"
            yield Reason(code="torch-arch", text=text)


def _check_stack(recipes: Recipes) -> Iterator[Reason]:
    """Check the packages that every image has against one another."""
    for pair in recipes.pairs:
        here, other = recipes.stack.get(pair.package), recipes.stack.get(pair.needs)
        if here and other and satisfies(here, pair.versions) and not satisfies(other, pair.bound):
            text = f"{pair.package} {here} works with {pair.needs} {pair.bound}; found {other}"
            yield Reason(code="stack-pair", text=text)


def _runs(arch: str, codes: tuple[str, ...]) -> bool:
    """Return whether a device runs one of these codes: same major, and no newer minor."""
    here = _SM.fullmatch(arch)
    return here is not None and any(
        (code := _SM.fullmatch(text)) is not None and code[1] == here[1] and code[2] <= here[2]
        for text in codes
    )


def _check_coverage(image: Image) -> Iterator[Reason]:
    """Yield the image's architectures that no kernel of it supports."""
    if image.accelerator == "cpu":
        return
    for arch in image.archs:
        if not any(arch in kernel_archs(image, choice) for choice in image.kernels):
            text = f"{image.name} promises {arch}; none of its kernels serves it"
            yield Reason(code="arch-unserved", text=text)


def reasons_against_kernel(image: Image, choice: ImageKernel, recipes: Recipes) -> Iterator[Reason]:
    """Return every reason why a kernel that has a recipe can't be part of an image."""
    kernel = recipes.kernels[choice.name]
    yield from _check_versions(image, kernel, recipes)
    yield from _check_archs(image, kernel, choice)
    yield from _check_backends(image, kernel, choice)
    yield from _check_other_kernels(image, kernel, recipes)


def kernel_archs(image: Image, choice: ImageKernel) -> tuple[str, ...]:
    """Return the architectures that a kernel has to support in an image."""
    return choice.archs or image.archs


def device_name(arch: str) -> str:
    """Return the device that a compiler target is for: sm_90a is machine code for sm_90."""
    return re.sub(r"(?<=\d)[af]$", "", arch) if arch.startswith("sm_") else arch


def satisfies(version: str, bound: str) -> bool:
    """Return whether a version, a pre-release too, is within a bound."""
    return SpecifierSet(bound).contains(version, prereleases=True)


def _check_versions(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[Reason]:
    label = f"{kernel.name} {kernel.version}"
    if not satisfies(image.python, kernel.python):
        text = f"{label} needs Python {kernel.python}; found {image.python}"
        yield Reason(code="kernel-python", text=text)
    if isinstance(image.torch, Unresolved):
        return
    if not satisfies(image.torch, kernel.torch):
        text = f"{label} needs torch {kernel.torch}; found {image.torch}"
        yield Reason(code="kernel-torch", text=text)
    torch = recipes.torch.get(image.torch)
    # The headers of the stable ABI do not include those that need a newer C++ standard.
    if torch and kernel.abi == "torch" and (kernel.cxx_standard or 0) < torch.cxx_standard:
        text = (
            f"torch {image.torch}'s headers need C++{torch.cxx_standard}; "
            f"{label} is compiled as C++{kernel.cxx_standard}"
        )
        yield Reason(code="kernel-cxx", text=text)
    release = cuda_release(image, recipes)
    toolkit = recipes.cuda.get(release) if release else None
    if toolkit and kernel.nvcc and not satisfies(toolkit.nvcc, kernel.nvcc):
        text = f"{label} needs nvcc {kernel.nvcc}; found {toolkit.nvcc} of CUDA {release}"
        yield Reason(code="kernel-nvcc", text=text)


def _check_archs(image: Image, kernel: Kernel, choice: ImageKernel) -> Iterator[Reason]:
    if image.accelerator not in kernel.build:
        text = f"{kernel.name} is built on {' '.join(kernel.build)}; found {image.accelerator}"
        yield Reason(code="kernel-accelerator", text=text)
    for arch in kernel_archs(image, choice):
        if arch not in kernel.archs:
            has = " ".join(kernel.archs)
            text = f"{kernel.name} {kernel.version} serves {has}; found {arch}"
            yield Reason(code="kernel-arch", text=text)


def _check_backends(image: Image, kernel: Kernel, choice: ImageKernel) -> Iterator[Reason]:
    """Check that a kernel's backend can run on the architectures for which it is built."""
    for name in kernel.backends:
        backend = backend_named(name)
        if backend is None:
            yield Reason(code="unknown-backend", text=f"{kernel.name} serves unknown {name!r}")
            continue
        for arch in kernel_archs(image, choice):
            if not runs_on(backend.needs, arch_from_name(device_name(arch))):
                text = f"backend {name} needs {backend.needs.arch_text}; found {arch}"
                yield Reason(code="backend-arch", text=text)


def _check_other_kernels(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[Reason]:
    """Check a kernel against the other kernels and the pinned stack."""
    names = {choice.name for choice in image.kernels}
    label = f"{kernel.name} {kernel.version}"
    versions = dict(recipes.stack)
    versions |= {n: recipes.kernels[n].version for n in names & set(recipes.kernels)}
    for other, bound in kernel.beside.items():
        if other in versions and not satisfies(versions[other], bound):
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

"""Find all reasons why an image can't be built, each with what was found and needed.

A bound on an unresolved value is not checked: publishing refuses such an image anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from attnimg.backends import find_backend, runs_on
from attnimg.selection.gpus_and_images import arch_from_name
from recipes.archs import can_run, device_name
from recipes.facts import (
    PLATFORMS,
    Base,
    Image,
    ImageKernel,
    Kernel,
    Platform,
    Recipes,
    RocmBuild,
    Torch,
    Unresolved,
)

# What the build serves, and which of its files have it written in them.
SERVED = {
    "python": (
        "3.11",
        "docker/install/prune.py, copy_headers.py beside it, docker/Dockerfile, the lock files and "
        "torch's CPU build are for it",
    ),
    "debian": ("bookworm", "docker/base.sh and the packages of docker/Dockerfile are for it"),
}


# Platform -> the CPU architecture in the names of its wheels.
MACHINES: dict[Platform, str] = {"linux/amd64": "x86_64", "linux/arm64": "aarch64"}


def reasons_against(image: Image, recipes: Recipes) -> tuple[str, ...]:
    """Return every reason why an image can't be built; none means that it can."""
    found = [*_check_names(image, recipes), *_check_stack(recipes)]
    for platform in image.platforms:
        # A reason that holds on every platform is given once.
        found += _reasons_on_platform(on_platform(image, platform), recipes)
    return tuple(dict.fromkeys(found))


def on_platform(image: Image, platform: Platform) -> Image:
    """Return an image as it is on one of its platforms: with the kernels that it has there."""
    kernels = tuple(one for one in image.kernels if platform in (one.platforms or image.platforms))
    return replace(image, platforms=(platform,), kernels=kernels)


def _reasons_on_platform(image: Image, recipes: Recipes) -> Iterator[str]:
    """Yield the reasons why an image of one platform can't be built."""
    yield from _check_base_and_torch(image, recipes)
    (platform,) = image.platforms
    for image_kernel in image.kernels:
        if kernel := recipes.kernels.get(image_kernel.name):
            archs = kernel_archs(image, image_kernel)
            if platform not in kernel.platforms:
                has = " ".join(kernel.platforms)
                yield f"{kernel.name} {kernel.version} is for {has}; found {platform}"
            yield from _check_versions(image, kernel, recipes)
            yield from _check_archs(image, kernel, archs)
            yield from _check_backends(kernel, archs)
            yield from _check_other_kernels(image, kernel, recipes)
    yield from _check_coverage(image)


def _check_names(image: Image, recipes: Recipes) -> Iterator[str]:
    for image_kernel in image.kernels:
        if image_kernel.name not in recipes.kernels:
            known = ", ".join(sorted(recipes.kernels))
            yield f"found kernel {image_kernel.name!r}; known: {known}"
        for arch in set(image_kernel.archs) - set(image.archs):
            yield f"{image_kernel.name} has {arch}, which the archs of {image.name} lack"
        for platform in image_kernel.platforms:
            if platform not in image.platforms:
                yield f"{image_kernel.name} has {platform}, which {image.name} is not built for"
        kernel = recipes.kernels.get(image_kernel.name)
        limited = image_kernel.platforms and set(image_kernel.platforms) != set(image.platforms)
        if limited and kernel and kernel.form != "wheel":
            yield (
                f"{kernel.name} is compiled, and limited to {' '.join(image_kernel.platforms)}; "
                "the bake file compiles the same kernels on all platforms"
            )
    names = [image_kernel.name for image_kernel in image.kernels]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"found {name} twice in kernels"


def _check_base_and_torch(image: Image, recipes: Recipes) -> Iterator[str]:
    """Check base, torch, its CUDA release, Python and architectures against one another."""
    (platform,) = image.platforms
    if image.base not in recipes.bases:
        known = ", ".join(recipes.bases)
        yield f"base {image.base} is not in recipes/bases.toml; known: {known}"
    else:
        yield from _check_base(image, recipes.bases[image.base])
    vendors = {"cpu": "cpu", "cuda": "nvidia", "rocm": "amd"}
    for arch in image.archs:
        if arch_from_name(device_name(arch)).vendor != vendors[image.accelerator]:
            yield f"found {arch} in an image for {image.accelerator}"
    if isinstance(image.torch, Unresolved):
        return
    torch = recipes.torch.get(image.torch)
    if torch is None:
        yield (
            f"torch {image.torch} is not in recipes/torch.toml; known: {', '.join(recipes.torch)}"
        )
    elif not satisfies(image.python, torch.python):
        yield f"torch {image.torch} needs Python {torch.python}; found {image.python}"
    if image.accelerator == "cpu" and torch and not cpu_wheels(torch, image.python, platform):
        python = f"cp{image.python.replace('.', '')}"
        on = "" if platform == PLATFORMS[0] else f" on {platform}"
        yield f"torch {image.torch} has no CPU build for {python}{on} in recipes/torch.toml"
    if image.accelerator == "cuda" and torch and platform not in torch.platforms:
        has = " ".join(torch.platforms)
        yield f"torch {image.torch} has a CUDA build for {has}; found {platform}"
    if image.accelerator == "cuda":
        yield from _check_cuda(image, recipes)
    if image.accelerator == "rocm" and torch:
        if torch.rocm is None:
            yield f"torch {image.torch} has no ROCm build in recipes/torch.toml"
        elif torch.rocm.release not in recipes.rocm:
            known = ", ".join(recipes.rocm)
            release = f"ROCm {torch.rocm.release} of torch {image.torch}"
            yield f"{release} is not in recipes/rocm.toml; known: {known}"


def cpu_wheels(torch: Torch, python: str, platform: Platform) -> list[str]:
    """Return the names of a release's CPU wheels for one Python and platform."""
    tag, end = f"-cp{python.replace('.', '')}-", f"_{MACHINES[platform]}.whl"
    names = torch.cpu.wheels if torch.cpu else ()
    return [name for name in names if tag in name and name.endswith(end)]


def _check_base(image: Image, base: Base) -> Iterator[str]:
    """Check that the Dockerfile and docker/install serve the base: one Python, one Debian."""
    for key, found in {"python": image.python, "debian": base.debian}.items():
        served, why = SERVED[key]
        if found != served:
            yield f"base {base.name}: {key} {found} is not served, only {served}: {why}"
    for platform in image.platforms:
        if base.platforms and platform not in base.platforms:
            yield f"base {base.name} is for {' '.join(base.platforms)}; found {platform}"
    for text in base.open:
        yield f"base {base.name} is not served yet; missing: {text}"


def cuda_release(image: Image, recipes: Recipes) -> str | None:
    """Return the CUDA release of an image's torch; None if that is not known, or not CUDA."""
    torch = recipes.torch.get(str(image.torch)) if image.accelerator == "cuda" else None
    return torch.toolkit if torch else None


def rocm_build(image: Image, recipes: Recipes) -> RocmBuild | None:
    """Return the ROCm build of an image's torch; None if it has none, or is not for ROCm."""
    torch = recipes.torch.get(str(image.torch)) if image.accelerator == "rocm" else None
    return torch.rocm if torch else None


def _check_cuda(image: Image, recipes: Recipes) -> Iterator[str]:
    torch = recipes.torch.get(str(image.torch))
    if torch is None:
        return
    toolkit = recipes.cuda.get(torch.toolkit)
    if toolkit is None:
        known = ", ".join(recipes.cuda)
        release = f"CUDA {torch.toolkit} of torch {image.torch}"
        yield f"{release} is not in recipes/cuda.toml; known: {known}"
        return
    (platform,) = image.platforms
    codes = torch.archs.get(platform, ())
    on = "" if platform == PLATFORMS[0] else f" on {platform}"
    for arch in image.archs:
        if arch not in toolkit.archs:
            yield f"CUDA {torch.toolkit} compiles for {' '.join(toolkit.archs)}; found {arch}"
        if codes and not any(can_run(arch, code) for code in codes):
            yield f"torch {image.torch} has machine code for {' '.join(codes)}{on}; found {arch}"


def _check_stack(recipes: Recipes) -> Iterator[str]:
    """Check the packages that every image has against one another."""
    for pair in recipes.pairs:
        version, other = recipes.stack.get(pair.package), recipes.stack.get(pair.needs)
        if version is None or other is None or not satisfies(version, pair.versions):
            continue
        if not satisfies(other, pair.bound):
            yield f"{pair.package} {version} works with {pair.needs} {pair.bound}; found {other}"


def _check_coverage(image: Image) -> Iterator[str]:
    """Yield the image's architectures that no kernel of it supports."""
    if image.accelerator == "cpu":
        return
    for arch in image.archs:
        if not any(arch in kernel_archs(image, image_kernel) for image_kernel in image.kernels):
            yield f"{image.name} has {arch}; none of its kernels supports it"


def kernel_archs(image: Image, image_kernel: ImageKernel) -> tuple[str, ...]:
    """Return the architectures that a kernel has to support in an image."""
    return image_kernel.archs or image.archs


def satisfies(version: str, bound: str) -> bool:
    """Return whether a version, a pre-release too, is within a bound."""
    return SpecifierSet(bound).contains(version, prereleases=True)


def _check_versions(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[str]:
    label = f"{kernel.name} {kernel.version}"
    if not satisfies(image.python, kernel.python):
        yield f"{label} needs Python {kernel.python}; found {image.python}"
    if isinstance(image.torch, Unresolved):
        return
    if not satisfies(image.torch, kernel.torch):
        yield f"{label} needs torch {kernel.torch}; found {image.torch}"
    torch = recipes.torch.get(image.torch)
    # The headers of the stable ABI do not include those that need a newer C++ standard.
    if torch and kernel.abi == "torch" and (kernel.cxx_standard or 0) < torch.cxx_standard:
        yield (
            f"torch {image.torch}'s headers need C++{torch.cxx_standard}; "
            f"{label} is compiled as C++{kernel.cxx_standard}"
        )
    release = cuda_release(image, recipes)
    toolkit = recipes.cuda.get(release) if release else None
    if toolkit and kernel.nvcc and not satisfies(toolkit.nvcc, kernel.nvcc):
        yield f"{label} needs nvcc {kernel.nvcc}; found {toolkit.nvcc} of CUDA {release}"


def _check_archs(image: Image, kernel: Kernel, archs: tuple[str, ...]) -> Iterator[str]:
    if image.accelerator not in kernel.build:
        yield f"{kernel.name} is built on {' '.join(kernel.build)}; found {image.accelerator}"
    for arch in archs:
        if arch not in kernel.archs:
            has = " ".join(kernel.archs)
            yield f"{kernel.name} {kernel.version} supports {has}; found {arch}"


def _check_backends(kernel: Kernel, archs: tuple[str, ...]) -> Iterator[str]:
    """Check that a kernel's backend can run on the architectures for which it is built."""
    for name in kernel.backends:
        backend = find_backend(name)
        if backend is None:
            yield f"{kernel.name} lists the unknown backend {name!r}"
            continue
        for arch in archs:
            if not runs_on(backend.needs, arch_from_name(device_name(arch))):
                yield f"backend {name} needs {backend.needs.arch_text}; found {arch}"


def _pins(kernel: Kernel) -> dict[str, str]:
    """Return the version of a kernel, and those that it pins of other packages."""
    needs = (Requirement(text) for text in kernel.requires)
    pinned = {need.name: str(need.specifier)[2:] for need in needs if "==" in str(need.specifier)}
    return {kernel.name: kernel.version, **pinned}


def _check_other_kernels(image: Image, kernel: Kernel, recipes: Recipes) -> Iterator[str]:
    """Check a kernel against the other kernels and the pinned stack."""
    names = {image_kernel.name for image_kernel in image.kernels}
    label = f"{kernel.name} {kernel.version}"
    versions = dict(recipes.stack)
    for one in (recipes.kernels[n] for n in sorted(names & set(recipes.kernels))):
        versions |= _pins(one)
    torch = recipes.torch.get(str(image.torch))
    versions |= {"torch": str(image.torch), "triton": torch.triton} if torch else {}
    for package, version in _pins(kernel).items():
        for pair in recipes.pairs:
            found = versions.get(pair.needs)
            if pair.package != package or found is None or not satisfies(version, pair.versions):
                continue
            if not satisfies(found, pair.bound):
                yield f"{package} {version} works with {pair.needs} {pair.bound}; found {found}"
    for other, bound in kernel.beside.items():
        if other in versions and not satisfies(versions[other], bound):
            yield f"{label} needs {other} {bound} beside it; found {versions[other]}"
    for need in kernel.needs:
        if need.kernel not in names and need.beside in names | {""}:
            beside = f" beside {need.beside}" if need.beside else ""
            yield f"{label} needs {need.kernel}{beside}; found none: {need.reason}"
    removed = {removal.path for removal in kernel.remove}
    for name in sorted(names - {kernel.name}):
        other_kernel = recipes.kernels.get(name)
        for path in other_kernel.owns if other_kernel else ():
            if path in kernel.ships and path not in removed:
                yield f"{label} installs {path}, which {name} owns; needed: to remove it"

"""Check the values of one recipe: hashes, sources, bounds, names of architectures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from recipes.facts import Base, Image, Kernel

_ARCH = re.compile(r"cpu|sm_[1-9][0-9]{1,2}[af]?|gfx[1-9][0-9a-f]{2,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RELEASE = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+]+")
_COMMIT = re.compile(r"[A-Za-z0-9][\w-]*/[\w.-]+@[0-9a-f]{40}")
_HEADS = re.compile(r"[1-9]\d*/[1-9]\d*")


def image_faults(image: Image) -> Iterator[str]:
    """Yield what is wrong with the values of an image's file."""
    yield from _arch_faults("archs", image.archs)
    for choice in image.kernels:
        yield from _arch_faults(f"kernels.{choice.name}.archs", choice.archs)
    if not image.archs:
        yield "archs: found none, needed at least one"


def base_faults(base: Base) -> Iterator[str]:
    """Yield what is wrong with the values of a base image."""
    if isinstance(base.digest, str) and not _SHA256.fullmatch(base.digest.removeprefix("sha256:")):
        yield f"digest: found {base.digest!r}, needed sha256: and 64 hexadecimal digits"


def kernel_faults(kernel: Kernel) -> Iterator[str]:
    """Yield what is wrong with the values of a kernel's file."""
    yield from _arch_faults("archs", tuple(kernel.archs))
    if _RELEASE.fullmatch(kernel.source):
        if kernel.sha256 is None:
            yield f"sha256: missing; {kernel.source} needs its archive's, or an `unresolved` reason"
        elif isinstance(kernel.sha256, str) and not _SHA256.fullmatch(kernel.sha256):
            yield f"sha256: found {kernel.sha256!r}, needed 64 hexadecimal digits"
        if not kernel.source.endswith(f"=={kernel.version}"):
            yield f"source: found {kernel.source!r}, but version is {kernel.version!r}"
    elif not _COMMIT.fullmatch(kernel.source):
        yield f"source: found {kernel.source!r}, needed name==version or owner/name@40-digit commit"
    if (kernel.form == "git") != bool(_COMMIT.fullmatch(kernel.source)):
        yield f"form: found {kernel.form!r} for {kernel.source!r}"
    for wheel in kernel.prebuilt:
        if not _SHA256.fullmatch(wheel.sha256):
            yield f"prebuilt.sha256: found {wheel.sha256!r}, needed 64 hexadecimal digits"
        if not wheel.abi and kernel.abi == "torch":
            yield f"prebuilt.abi: missing; {wheel.source} is bound to a torch and a Python"
    for path, source in kernel.submodules.items():
        if not _COMMIT.fullmatch(source):
            yield f"submodules.{path}: found {source!r}, needed owner/name@40-digit commit"
    for key, text in (("torch", kernel.torch), ("python", kernel.python), ("nvcc", kernel.nvcc)):
        yield from _specifier_faults(key, text)
    for name, text in kernel.beside.items():
        yield from _specifier_faults(f"beside.{name}", text)
    yield from _ahead_of_time_faults(kernel)
    for head_dim, pairs in (kernel.triton.heads if kernel.triton else {}).items():
        for pair in pairs:
            if not _HEADS.fullmatch(pair):
                yield f"triton.heads.{head_dim}: found {pair!r}, needed query/key-value heads: 32/8"
    for text in kernel.requires:
        try:
            Requirement(text)
        except InvalidRequirement:
            yield f"requires: found {text!r}, needed a pip requirement"


def _ahead_of_time_faults(kernel: Kernel) -> Iterator[str]:
    """Check the kernels to compile when an image is built: each architecture has a target."""
    asked = kernel.ahead_of_time
    if asked is None:
        return
    for arch in sorted(set(kernel.archs) ^ set(asked.targets)):
        yield f"ahead_of_time.targets.{arch}: needed for each of archs, and for no other"
    for model in asked.models:
        where = f"ahead_of_time.models: {model.model}"
        if model.source not in asked.sources:
            yield f"{where}: found source {model.source!r}, needed one of ahead_of_time.sources"
        if model.kv_heads < 1 or model.heads % model.kv_heads:
            yield f"{where}: found {model.heads} heads for {model.kv_heads} kv_heads"
    names = [model.model for model in asked.models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"ahead_of_time.models: {name} is listed more than once"


def _arch_faults(key: str, archs: tuple[str, ...]) -> Iterator[str]:
    for arch in archs:
        if not _ARCH.fullmatch(arch):
            yield f"{key}: found {arch!r}, needed cpu, sm_NN[a], sm_NNN[a] or gfxNNN"


def _specifier_faults(key: str, text: str) -> Iterator[str]:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        yield f"{key}: found {text!r}, needed a version bound such as >=2.10"

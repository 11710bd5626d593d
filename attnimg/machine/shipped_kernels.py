"""Read which precompiled kernels the image has, and check whether this machine can use them.

docker/precompiled compiles them: a folder for each architecture, and a manifest.json with a
fingerprint of the software that they were compiled with. fingerprint.py computes the fingerprint of
this machine's software, kernel_cache.py copies the kernels to the user's caches, and doctor.py
reports why they are not used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from attnimg.errors import bad_manifest
from attnimg.facts import Machine, Reason
from attnimg.files import read_data
from attnimg.machine.fingerprint import ABSENT, fingerprint, triton_in_short

FOLDER = Path("/opt/attnimg/fa4")
TRITON_FOLDER = Path("/opt/attnimg/triton")
CACHE_ON = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
CACHE_AT = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
# They are compiled by CuTe DSL for CUDA 13, and need a driver for CUDA 13.
# Source: recipes/cuda.toml, 13.0.
_DRIVER_MAJOR = 580


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedKernels:
    """Precompiled kernels in the image, and the software that would use them.

    Attributes:
        key: a hash of `built`; for FlashAttention-4 part of the path of its cache folder.
        built: the software that they were compiled with: "python" or a package -> its version, a
            folder -> its hash.
        found: the same software as installed here.
        kernels: architecture, "sm_90" -> number of kernels.
        settings: variables that are set here and select other kernels or another folder.
    """

    key: str
    built: Mapping[str, str]
    found: Mapping[str, str]
    kernels: Mapping[str, int]
    settings: tuple[str, ...] = ()


def shipped_kernels(folder: Path = FOLDER) -> ShippedKernels | None:
    """Read the manifest of FlashAttention-4's kernels in the image; return None if it has none.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    found = _read(folder, found=fingerprint, variables="flash_attention_4")
    if found is None:
        return None
    # The user has moved the cache or turned it off.
    off = [CACHE_ON] if os.environ.get(CACHE_ON, "1") != "1" else []
    elsewhere = [CACHE_AT] if found.key not in (os.environ.get(CACHE_AT) or found.key) else []
    return replace(found, settings=(*found.settings, *off, *elsewhere))


def shipped_triton(folder: Path = TRITON_FOLDER) -> ShippedKernels | None:
    """Read the manifest of SageAttention's Triton kernels in the image; return None if it has none.

    `built` has only the items of triton_in_short(): the others need half a gigabyte of reading.

    Raises:
        AttnimgError: the manifest exists but can't be read (code "bad-image").
    """
    found = _read(folder, found=triton_in_short, variables="triton")
    if found is None:
        return None
    built = {name: value for name, value in found.built.items() if name in found.found}
    return replace(found, built=built)


def _read(
    folder: Path, *, found: Callable[[], dict[str, str]], variables: str
) -> ShippedKernels | None:
    """Read a manifest.json; `variables` is a row of data/kernel_variables.toml."""
    manifest, names = folder / "manifest.json", read_data("kernel_variables.toml")[variables]
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        key, built = raw["key"], dict(raw["fingerprint"])
        kernels = {arch: target["kernels"] for arch, target in raw["targets"].items()}
        wrong = [v for v in (key, *built.values()) if not isinstance(v, str)]
        if wrong := [*wrong, *(v for v in kernels.values() if not isinstance(v, int))]:
            raise TypeError(f"found {wrong[0]!r:.60} as a name, a version or a count")
        return ShippedKernels(
            key=key,
            built=built,
            found=found(),
            kernels=kernels,
            settings=tuple(name for name in names if name in os.environ),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_manifest(manifest, error) from error


def reasons_against_shipped(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Return the reasons why FlashAttention-4 on an NVIDIA GPU does not use the image's kernels."""
    arch, others = machine.arch.name, machine.other_archs
    found = [*_other_gpu(shipped, (arch,))]
    if others:
        # A folder is for one architecture only, as some keys in it do not contain the architecture.
        text = f"GPUs differ: {arch} and {' '.join(others)}"
        found.append(Reason(code="kernels-mixed-gpus", text=text))
    major = (machine.driver or "").partition(".")[0]
    if major.isdecimal() and int(major) < _DRIVER_MAJOR:
        text = f"they need driver {_DRIVER_MAJOR} or newer, found {machine.driver}"
        found.append(Reason(code="kernels-driver", text=text))
    return (*found, *_other_packages(shipped))


def reasons_against_shipped_triton(shipped: ShippedKernels, machine: Machine) -> tuple[Reason, ...]:
    """Return the reasons why Triton compiles kernels again on a machine with NVIDIA GPUs."""
    # One folder has the kernels of several architectures, whose names differ.
    archs = (machine.arch.name, *machine.other_archs)
    return (*_other_gpu(shipped, archs), *_other_packages(shipped))


def _other_gpu(shipped: ShippedKernels, archs: tuple[str, ...]) -> Iterator[Reason]:
    if missing := [arch for arch in archs if arch not in shipped.kernels]:
        text = f"they are for {' '.join(shipped.kernels)}, found {' '.join(missing)}"
        yield Reason(code="kernels-arch", text=text)


def _other_packages(shipped: ShippedKernels) -> Iterator[Reason]:
    for name, built in shipped.built.items():
        here = shipped.found.get(name, ABSENT)
        if here != built:
            # 12 characters of a hash; versions are shorter.
            text = f"compiled with another: {name} {built[:12]} -> {here[:12]}"
            yield Reason(code="kernels-packages", text=text)

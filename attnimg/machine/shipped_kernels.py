"""Read what kernels came compiled with the image, and what here decides whether they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from attnimg.errors import bad_manifest
from attnimg.machine.fingerprint import fingerprint, triton_in_short
from attnimg.machine.host_facts import ShippedKernels

_T = TypeVar("_T")

# docker/*_cache/build.py make these: a folder for each architecture, and manifest.json.
FOLDER = Path("/opt/attnimg/fa4")
TRITON_FOLDER = Path("/opt/attnimg/triton")
CACHE_ON = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
CACHE_AT = "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
# What of these is set stands in the key of a kernel, so that another one is looked for.
# Source: flash-attn-4 4.0.0b36, compile_key in interface.py (read 2026-11-25).
_IN_KEYS = (
    "FA_CLC",
    "FA_DISABLE_2CTA",
    "FA_DISABLE_S_PING_PONG",
    "FA_LOG_LEVEL",
    "FLASH_ATTENTION_ARCH",
    "FLASH_ATTENTION_BWD_TILE_N",
    "FLASH_ATTENTION_HD256_GENERIC_BWD",
)


# What of these is set, whatever to, stands in the name of every entry, or has all compiled anew.
# Source: triton 3.8.0, what get_cache_invalidating_env_vars() of libtriton gives with all of them
# set, without AMD's; and with the last five, a kernel was compiled anew (tried 2026-11-25).
_IN_TRITON_NAMES = (
    "ALLOW_LHS_TMEM_LAYOUT_CONVERSION",
    "DISABLE_LLVM_OPT",
    "DISABLE_MMA_V3",
    "DISABLE_MMA_V5",
    "DISABLE_PTXAS_OPT",
    "LLVM_ENABLE_TIMING",
    "LLVM_EXTRACT_DI_LOCAL_VARIABLES",
    "LLVM_IR_ENABLE_DUMP",
    "MLIR_DISABLE_MULTITHREADING",
    "MLIR_DUMP_PATH",
    "MLIR_ENABLE_DIAGNOSTICS",
    "MLIR_ENABLE_DUMP",
    "MLIR_ENABLE_TIMING",
    "NVPTX_ENABLE_DUMP",
    "TRITON_CONSAN_INIT_ALLOCATIONS",
    "TRITON_DEFAULT_FP_FUSION",
    "TRITON_DISABLE_LINE_INFO",
    "TRITON_DUMP_MIR",
    "TRITON_ENABLE_ASAN",
    "TRITON_ENABLE_EXPERIMENTAL_CONSAN",
    "TRITON_ENABLE_LLVM_DEBUG",
    "TRITON_F32_DEFAULT",
    "TRITON_LLVM_DEBUG_ONLY",
    "TRITON_OVERRIDE_ARCH",
    "TRITON_PARTITION_SCHEDULING_DUMP_DATA_ONLY",
    "TRITON_PARTITION_SCHEDULING_DUMP_LOOP_ONLY",
    "TRITON_PARTITION_SCHEDULING_ENABLE_DUMP_DOT",
    "USE_IR_LOC",
    "PTXAS_OPTIONS",
    "TRITON_ALWAYS_COMPILE",
    "TRITON_DEBUG",
    "TRITON_INSTRUMENTATION_MODE",
    "TRITON_MOCK_PTX_VERSION",
    # Read in it: another ptxas, another libdevice, another cache (compiler.py, knobs.py).
    "TRITON_PTXAS_PATH",
    "TRITON_PTXAS_BLACKWELL_PATH",
    "TRITON_LIBDEVICE_PATH",
    "TRITON_CACHE_MANAGER",
)


def shipped_kernels(folder: Path = FOLDER) -> ShippedKernels | None:
    """Read the manifest of FlashAttention-4's kernels in the image; None where it has none.

    Raises:
        AttnimgError: the manifest is there and can't be read (code "bad-image").
    """
    return _read(folder, found=fingerprint, settings=lambda key: (*_IN_KEYS, *_elsewhere(key)))


def shipped_triton(folder: Path = TRITON_FOLDER) -> ShippedKernels | None:
    """Read the manifest of SageAttention's Triton kernels in the image; None where it has none.

    Of what they were compiled with, only that is given which is known here without reading half a
    gigabyte.

    Raises:
        AttnimgError: the manifest is there and can't be read (code "bad-image").
    """
    whole = _read(folder, found=triton_in_short, settings=lambda _: _IN_TRITON_NAMES)
    if whole is None:
        return None
    built = {name: value for name, value in whole.built.items() if name in whole.found}
    return replace(whole, built=built)


def _read(
    folder: Path,
    *,
    found: Callable[[], dict[str, str]],
    settings: Callable[[str], tuple[str, ...]],
) -> ShippedKernels | None:
    manifest = folder / "manifest.json"
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        return ShippedKernels(
            key=(key := _checked(raw["key"], str)),
            built={name: _checked(version, str) for name, version in raw["fingerprint"].items()},
            found=found(),
            kernels={
                arch: _checked(target["kernels"], int) for arch, target in raw["targets"].items()
            },
            settings=tuple(name for name in settings(key) if name in os.environ),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise bad_manifest(manifest, error) from error


def _checked(value: object, kind: type[_T]) -> _T:
    if not isinstance(value, kind):
        raise TypeError(f"found {value!r:.60}; needed {kind.__name__}")
    return value


def _elsewhere(key: str) -> tuple[str, ...]:
    """Name the variables that a person sets to have FlashAttention-4's cache elsewhere, or off."""
    on, at = os.environ.get(CACHE_ON, "1"), os.environ.get(CACHE_AT)
    return (*([CACHE_ON] if on != "1" else []), *([CACHE_AT] if at and key not in at else []))

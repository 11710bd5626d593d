"""Read what kernels came compiled with the image, and what here decides whether they are used."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TypeVar

from attnimg.errors import bad_manifest
from attnimg.host_facts import ShippedKernels
from attnimg.probe.fingerprint import fingerprint

_T = TypeVar("_T")

# docker/fa4_cache/build.py makes it: a folder for each architecture, and manifest.json.
FOLDER = Path("/opt/attnimg/fa4")
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


def shipped_kernels(folder: Path = FOLDER) -> ShippedKernels | None:
    """Read the manifest of the image's kernels; None where it has none.

    Raises:
        AttnimgError: the manifest is there and can't be read (code "bad-image").
    """
    manifest = folder / "manifest.json"
    try:
        raw = json.loads(manifest.read_text(encoding="utf-8"))
        return ShippedKernels(
            key=(key := _checked(raw["key"], str)),
            built={name: _checked(version, str) for name, version in raw["fingerprint"].items()},
            found=fingerprint(),
            kernels={
                arch: _checked(target["kernels"], int) for arch, target in raw["targets"].items()
            },
            settings=tuple(name for name in (*_IN_KEYS, *_elsewhere(key)) if name in os.environ),
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

"""Read how a checkpoint is quantized from its config.json, and what attnimg does with it.

data/quantizations.toml has a row for each method of transformers.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

# Fields of config.json that describe the language model of multimodal models.
LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """A row of data/quantizations.toml; the file explains its keys."""

    loaded: Literal["dequantized", "kept", "refused"]
    source: str
    packages: tuple[str, ...] = ()
    bits: int | None = None
    why: str = ""


@cache
def quantizations() -> Mapping[str, Quantization]:
    """Read data/quantizations.toml: quant_method -> what happens to such a checkpoint."""
    path = resources.files("attnimg").joinpath("data", "quantizations.toml")
    rows = tomllib.loads(path.read_text(encoding="utf-8"))
    return {
        name: Quantization(**row | {"packages": tuple(row.get("packages", ()))})
        for name, row in rows.items()
    }


def packages() -> list[str]:
    """Return the distributions that any quantized checkpoint needs, as requirements."""
    return sorted({package for row in quantizations().values() for package in row.packages})


def quantization_of(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization_config of a config.json, None where it has none.

    It may stand in the part of the language model; older versions of llm-compressor called it
    compression_config.

    Args:
        raw: the config.json.
    """
    parts = (part for name in LANGUAGE_PARTS if isinstance(part := raw.get(name), Mapping))
    for config in (raw, *parts):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := config.get(key), Mapping) and found:
                return found
    return None


def method_of(quantization: Mapping[str, Any]) -> str:
    """Return the row's name for a quantization_config; "none named" where it has no method."""
    for bits in (4, 8):
        if quantization.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(quantization.get("quant_method") or "none named")


def bits_of(quantization: Mapping[str, Any]) -> int | None:
    """Return how many bits the weights of a checkpoint have; None where its config does not say.

    gptq and awq: {"bits": 4}, in old configs {"w_bit": 4}. torchao names a class: {"quant_type":
    {"default": {"_type": "Int8WeightOnlyConfig"}}}.
    """
    for key in ("bits", "w_bit"):
        if isinstance(bits := quantization.get(key), int):
            return bits
    kind = quantization.get("quant_type")
    named = str(kind.get("default", kind).get("_type", "")) if isinstance(kind, Mapping) else ""
    digits = "".join(char for char in named if char.isdigit())[:1]
    return int(digits) if digits else None

"""The table of known model families: what their config.json leaves out and how layers alternate."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """How layer kinds alternate where config.json does not list them; see data/families.toml."""

    every: int | None = None
    every_key: str | None = None
    offset: int | None = None
    offset_key: str | None = None
    flags: str | None = None
    slide_from: str | None = None
    nth: str = "full_attention"
    others: str = "sliding_attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One model_type; the keys of data/families.toml, explained there."""

    known: bool = True
    attention: bool = True
    window: Literal["every layer", "sliding layers"] = "sliding layers"
    window_switch: str | None = None
    sinks: Literal["every layer", "sliding layers"] | None = None
    last_full: bool = False
    listed_in: str | None = None
    pattern: Pattern | None = None
    weights: Literal["dense", "moe"] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_families() -> dict[str, Family]:
    """Read data/families.toml: model_type -> family."""
    path = resources.files("attnimg").joinpath("data", "families.toml")
    return {name: _family(entry) for name, entry in tomllib.loads(path.read_text("utf-8")).items()}


def _family(entry: dict[str, Any]) -> Family:
    pattern = entry.pop("pattern", None)
    if pattern and "from" in pattern:
        pattern["slide_from"] = pattern.pop("from")
    defaults = entry.pop("shape", {}) | entry.pop("size", {})
    return Family(**entry, pattern=pattern and Pattern(**pattern), defaults=defaults)

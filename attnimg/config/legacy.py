"""Turn axolotl's old boolean flags (flash_attention: true) into attn_implementation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from attnimg.config.keys import LEGACY
from attnimg.facts import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class Modern:
    """A config without legacy keys, and what was found while taking them out."""

    values: dict[str, Any]
    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]


def modernise(values: dict[str, Any]) -> Modern:
    """Map the legacy keys of one config.

    Args:
        values: the YAML's mapping, without nulls.

    Returns:
        The mapping with all seven keys gone and attn_implementation set from the one that wins.
        Each key set to true also raises a real DeprecationWarning.
    """
    asked = [key for key in LEGACY if _is_true(values.get(key))]
    errors = [_bad_value(key, values[key]) for key in LEGACY if not _is_flag(values.get(key))]
    notes = [_deprecated(key) for key in asked]
    rest = {key: value for key, value in values.items() if key not in LEGACY}
    notes += [_ignored(key, winner=asked[0]) for key in asked[1:]]
    if asked and "attn_implementation" in rest:
        errors.append(_both(asked, rest["attn_implementation"]))
    elif asked:
        rest["attn_implementation"] = LEGACY[asked[0]]
    for key in asked:
        warnings.warn(
            f"{key} is deprecated: write attn_implementation: {LEGACY[key]}",
            DeprecationWarning,
            stacklevel=2,
        )
    return Modern(values=rest, errors=tuple(errors), warnings=tuple(notes))


def _is_true(value: object) -> bool:
    return value is True or (type(value) is int and value == 1)


def _is_flag(value: object) -> bool:
    return value is None or isinstance(value, bool) or (type(value) is int and value in (0, 1))


def _bad_value(key: str, value: object) -> Finding:
    return Finding(
        code="bad-value",
        key=key,
        what=f"{key} is neither true nor false",
        why=f"found {value!r}, a legacy flag is true or false",
        do=f"replace it by attn_implementation: {LEGACY[key]}, or remove it",
    )


def _deprecated(key: str) -> Finding:
    return Finding(
        code="legacy-flag-deprecated",
        key=key,
        what=f"{key} is an old name",
        do=f"replace it by attn_implementation: {LEGACY[key]}",
    )


def _ignored(key: str, *, winner: str) -> Finding:
    return Finding(
        code="legacy-flag-ignored",
        key=key,
        what=f"{key} is ignored: {winner} goes first",
        do=f"remove it; {LEGACY[winner]} is used",
    )


def _both(asked: list[str], name: object) -> Finding:
    flags = ", ".join(f"{key}: true" for key in asked)
    return Finding(
        code="canonical-plus-legacy",
        key=asked[0],
        what="attn_implementation and a legacy flag are both set",
        why=f"found attn_implementation: {name} and {flags}; one backend is chosen in one place",
        do=f"remove {' and '.join(asked)}",
    )

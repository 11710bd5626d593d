"""Refuse a sequence_len beyond a model's table of positions; warn of one beyond its RoPE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding
from attnimg.select.model_config import LANGUAGE_PARTS
from attnimg.select.model_types import PositionTable, position_table


def judge_positions(config: Config, raw: Mapping[str, Any]) -> Finding | None:
    """Compare sequence_len with the positions that a model has.

    Args:
        config: the validated run.
        raw: the model's config.json.

    Returns:
        A warning for rotary positions beyond those of the config; None where they suffice or are
        unknown.

    Raises:
        AttnimgError: the model's table of positions is shorter than sequence_len (code
            positions-short).
    """
    part = _language_part(raw)
    type_ = str(part.get("model_type") or raw.get("model_type"))
    table = position_table(type_)
    if table is not None:
        named = (part[key] for key in table.keys if isinstance(part.get(key), int))
        found = next(named, table.default) - _reserved(table, part)
        if config.sequence_len <= found:
            return None
        raise AttnimgError(
            f"{config.base_model} has {found:,} positions, fewer than sequence_len",
            why=f"found {found:,} positions ({type_}, {table.keys[0]} in config.json); "
            f"needed sequence_len {config.sequence_len:,}",
            do=f"set sequence_len: {found}",
            code="positions-short",
            key="sequence_len",
        )
    reach = rope_reach(part)
    if reach is None or config.sequence_len <= reach:
        return None
    return Finding(
        code="positions-beyond",
        key="sequence_len",
        what=f"sequence_len {config.sequence_len:,} exceeds the {reach:,} positions of "
        f"{config.base_model}, which was not trained on later ones",
        do=f"set sequence_len: {reach}, or scale its RoPE by rope_parameters in its "
        "config.json, such as rope_type yarn and a factor",
    )


def _reserved(table: PositionTable, part: Mapping[str, Any]) -> int:
    """Return how many positions no token can have."""
    padding = part.get("pad_token_id")
    return padding + 1 if table.reserved and isinstance(padding, int) else table.reserved


def rope_reach(part: Mapping[str, Any]) -> int | None:
    """Return how many positions a config's RoPE covers, including its scaling.

    Args:
        part: the part of config.json that describes the language model.

    Returns:
        max_position_embeddings, or the original length times the factor where that is more; None
        where the config has no such length, or ALiBi instead of RoPE.
    """
    longest = part.get("max_position_embeddings")
    if type(longest) is not int or part.get("alibi"):
        return None
    reach = float(longest)
    for scaling in _scalings(part):
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        factor = scaling.get("factor")
        if kind == "default" or not isinstance(factor, int | float):
            continue
        original = scaling.get("original_max_position_embeddings") or longest
        if isinstance(original, int | float):
            reach = max(reach, original * factor)
    return int(reach)


def _scalings(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE settings of a config: one for all layers, or one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = part.get(key)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))


def _language_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = (raw.get(name) for name in LANGUAGE_PARTS)
    return next((part for part in parts if isinstance(part, Mapping) and part), raw)

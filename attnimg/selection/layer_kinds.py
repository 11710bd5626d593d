"""Read the kind of each layer of a model: full attention, sliding, or without softmax attention.

data/families.toml has, for each model type, defaults for config.json and how layer kinds alternate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from attnimg.files import read_data
from attnimg.selection.model_config import Fields

FULL = frozenset({"full_attention", "attention", "global", "hybrid"})
SLIDING = frozenset({"sliding_attention", "sliding_window", "local"})
CHUNKED = frozenset({"chunked_attention"})
# Kinds of layers without softmax attention, which attention backends do not compute.
OTHER = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"})

_MAX_LAYERS = 10_000  # more is a typo, and could fill the memory
_NEMOTRON_H = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternation:
    """How layer kinds alternate, if config.json does not list them; see data/families.toml."""

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
    """One model_type: an entry of data/families.toml, which explains the keys."""

    known: bool = True
    attention: bool = True
    window: Literal["every layer", "sliding layers"] = "sliding layers"
    window_switch: str | None = None
    sinks: Literal["every layer", "sliding layers"] | None = None
    last_full: bool = False
    listed_in: str | None = None
    pattern: Alternation | None = None
    weights: Literal["dense", "moe"] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read_families() -> dict[str, Family]:
    """Read data/families.toml: model_type -> family."""
    families = {}
    for name, row in read_data("families.toml").items():
        defaults = row.pop("shape", {}) | row.pop("size", {})
        pattern = Alternation(**row.pop("pattern")) if "pattern" in row else None
        families[name] = Family(**row, pattern=pattern, defaults=defaults)
    return families


def layer_kinds(fields: Fields, family: Family) -> list[str]:
    """Return the kind of each layer, first to last.

    Raises:
        AttnimgError: a list in the config does not have one entry per layer (code "bad-model").
    """
    count = fields.whole("num_hidden_layers") or 0
    if count > _MAX_LAYERS:
        raise fields.refusal("num_hidden_layers", count, needed=f"at most {_MAX_LAYERS}")
    # Families with one window for all layers ignore layer_types.
    listed = fields.names("layer_types") if family.window == "sliding layers" else None
    if listed is None:
        kinds = _alternating(fields, family, count=count)
    elif len(listed) != count:
        raise fields.wrong_length("layer_types", len(listed), count=count)
    else:
        kinds = list(listed)
    if family.last_full:
        kinds[-1] = "full_attention"
    return kinds


def remarks_on(kinds: list[str], fields: Fields) -> list[str]:
    """Return sentences about layers that a LayerGroup cannot describe."""
    remarks = []
    counts = Counter(kinds)
    if chunked := sum(counts[kind] for kind in CHUNKED):
        size = fields.whole("attention_chunk_size")
        remarks.append(
            f"{chunked} of {len(kinds)} layers attend within chunks of {size} tokens; "
            "they are judged as full attention"
        )
    for kind in counts.keys() - FULL - SLIDING - CHUNKED - OTHER:
        remarks.append(
            f"{counts[kind]} of {len(kinds)} layers are {kind!r}, which is not known here; "
            "they are judged as full attention"
        )
    return sorted(remarks)


def _alternating(fields: Fields, family: Family, *, count: int) -> list[str]:
    pattern = family.pattern
    if pattern is None:
        # For a type that is not in the table, the window applies to every layer, unless the
        # config has use_sliding_window: false.
        switched_on = "use_sliding_window" not in fields.config or fields.flag("use_sliding_window")
        slides = not family.known and switched_on
        return ["sliding_attention" if slides else "full_attention"] * count
    if pattern.slide_from:
        start = fields.whole(pattern.slide_from, minimum=0) or 0
        return ["sliding_attention" if i >= start else "full_attention" for i in range(count)]
    if pattern.flags and (flags := fields.flags(pattern.flags)):
        if len(flags) != count:
            raise fields.wrong_length(pattern.flags, len(flags), count=count)
        return [pattern.others if flag else pattern.nth for flag in flags]
    every = fields.whole(pattern.every_key) if pattern.every_key else None
    every = every or pattern.every or 1
    offset = fields.whole(pattern.offset_key, minimum=0) if pattern.offset_key else None
    if offset is None:
        offset = every - 1 if pattern.offset is None else pattern.offset
    return [pattern.nth if i % every == offset else pattern.others for i in range(count)]


def with_layer_types(fields: Fields, *, listed_in: str | None) -> Fields:
    """Return the fields with layer_types, for a family that lists its layers in another way.

    Source: __post_init__ of NemotronHConfig, KimiLinearConfig and Lfm2Config in transformers 5.22.2
    (2026-11-26).

    Args:
        fields: the model's config.
        listed_in: the field that the family lists its layers in; None for layer_types.

    Raises:
        AttnimgError: the field is not such a list (code "bad-model").
    """
    if listed_in is None:
        return fields
    read = {
        "hybrid_override_pattern": _letters,
        "linear_attn_config": _numbered_from_one,
        "full_attn_idxs": _indices,
    }[listed_in]
    kinds = fields.names("layer_types") or read(fields, listed_in)
    if kinds is None:
        return fields
    changes: dict[str, object] = {"layer_types": kinds}
    if listed_in == "hybrid_override_pattern":
        # NemotronH has as many layers as it lists, and ignores num_hidden_layers.
        changes["num_hidden_layers"] = len(kinds)
    return fields.with_changes(changes)


def _letters(fields: Fields, key: str) -> list[str] | None:
    """Read NemotronH's layer list, "M-M*-", with one letter per layer."""
    text = fields.config.get(key)
    if text is None:
        return None
    if not isinstance(text, str) or not text or set(text) - set(_NEMOTRON_H):
        raise fields.refusal(key, text, needed=f"a text of {' '.join(_NEMOTRON_H)}")
    return [_NEMOTRON_H[letter] for letter in text]


def _numbered_from_one(fields: Fields, key: str) -> list[str]:
    """Read Kimi Linear's full_attn_layers and kda_layers, which count layers from 1.

    Without them, layers have attention at every fourth index except 0.
    """
    lists = fields.mapping(key) or {}
    count = fields.whole("num_hidden_layers") or 0
    full, linear = lists.get("full_attn_layers"), lists.get("kda_layers")
    if full is None or linear is None:
        return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
    if not all(isinstance(numbers, list) for numbers in (full, linear)):
        raise fields.refusal(key, dict(lists), needed="lists of layer numbers")
    kinds = dict.fromkeys(linear, "linear_attention") | dict.fromkeys(full, "full_attention")
    if set(kinds) != set(range(1, count + 1)):
        needed = f"each of the {count} layers in full_attn_layers or in kda_layers"
        raise fields.refusal(key, dict(lists), needed=needed)
    return [kinds[number] for number in range(1, count + 1)]


def _indices(fields: Fields, key: str) -> list[str] | None:
    """Read LFM2's indices of the layers with attention; the others are convolutions."""
    full = fields.config.get(key)
    if full is None:
        return None
    count = fields.whole("num_hidden_layers") or 0
    if not isinstance(full, list) or not all(type(i) is int and 0 <= i < count for i in full):
        raise fields.refusal(key, full, needed=f"a list of numbers below {count}")
    return ["full_attention" if i in full else "conv" for i in range(count)]

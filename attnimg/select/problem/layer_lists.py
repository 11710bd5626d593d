"""Families that list their layers' kinds in words of their own, read as a list of layer_types.

Source: __post_init__ of NemotronHConfig, KimiLinearConfig and Lfm2Config in transformers 5.22.2
(2026-11-26).
"""

from __future__ import annotations

from attnimg.select.problem.fields import Fields

_NEMOTRON_H = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


def with_layer_types(fields: Fields, *, listed_in: str | None) -> Fields:
    """Return the fields with layer_types made of a family's own list, where they have that alone.

    Args:
        fields: the model's config.
        listed_in: the field that the family lists its layers in; None for layer_types.

    Raises:
        AttnimgError: it is not such a list (code "bad-model").
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
        # NemotronH has as many layers as it lists, whatever num_hidden_layers says.
        changes["num_hidden_layers"] = len(kinds)
    return fields.with_changes(changes)


def _letters(fields: Fields, key: str) -> list[str] | None:
    """Read NemotronH's "M-M*-": one letter a layer."""
    text = fields.config.get(key)
    if text is None:
        return None
    if not isinstance(text, str) or not text or set(text) - set(_NEMOTRON_H):
        raise fields.refusal(key, text, needed=f"a text of {' '.join(_NEMOTRON_H)}")
    return [_NEMOTRON_H[letter] for letter in text]


def _numbered_from_one(fields: Fields, key: str) -> list[str]:
    """Read Kimi Linear's full_attn_layers and kda_layers, whose first layer is number 1.

    Without them every fourth layer has attention, but for the first.
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
    """Read LFM2's numbers of the layers with attention; the others are convolutions."""
    full = fields.config.get(key)
    if full is None:
        return None
    count = fields.whole("num_hidden_layers") or 0
    if not isinstance(full, list) or not all(type(i) is int and 0 <= i < count for i in full):
        raise fields.refusal(key, full, needed=f"a list of numbers below {count}")
    return ["full_attention" if i in full else "conv" for i in range(count)]

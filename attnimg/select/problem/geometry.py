"""From a raw config.json to the groups of equal attention layers of a model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from attnimg.facts import LayerGroup, Model
from attnimg.select.other_layers import UNLISTED, hybrid_types
from attnimg.select.problem.families import Family, read_families
from attnimg.select.problem.fields import Fields
from attnimg.select.problem.kinds import OTHER, SLIDING, layer_kinds, remarks_on
from attnimg.select.problem.layer_lists import with_layer_types
from attnimg.select.problem.parameters import count_parameters

# Where models that see or hear keep their language model.
_LANGUAGE_PARTS = ("text_config", "llm_config", "language_config")


def read_model(config: Mapping[str, Any], *, file: str = "config.json") -> Model:
    """Read the attention of every layer of a decoder from its config.json.

    Args:
        config: the raw mapping; fields that it leaves out have transformers' class defaults.
        file: how errors name what it was read from.

    Returns:
        Groups of equal layers in the order of their first appearance. What could not be known is in
        `unknown`; `layers` is empty when nothing could be read.

    Raises:
        AttnimgError: a field has a wrong type or contradicts another (code "bad-model").
    """
    type_, family, fields = _language_model(config, file)
    fields = with_layer_types(fields, listed_in=family.listed_in)
    unknown = []
    brings_code = "AutoModelForCausalLM" in (
        Fields(config=config, defaults={}, file=file).mapping("auto_map") or {}
    )
    if not family.known:
        unknown.append(f"model_type {type_!r} is not in the table; it was read by the general rule")
    if fields.flag("is_encoder_decoder"):
        unknown.append("it has an encoder as well; cross-attention was not looked at")
    count = fields.whole("num_hidden_layers")
    if not family.attention:
        return Model(
            type=type_,
            layers=(),
            other_layers=(("mamba", count or 0),),
            unknown=tuple(unknown),
            brings_code=brings_code,
        )
    if missing := _missing(fields):
        unknown.append(f"{file} has no {missing}, so its attention layers are not known")
        return Model(type=type_, layers=(), unknown=tuple(unknown), brings_code=brings_code)
    kinds = layer_kinds(fields, family)
    unknown.extend(remarks_on(kinds, fields))
    per_layer = _per_layer_changes(fields, kinds)
    groups: Counter[LayerGroup] = Counter()
    for index, kind in enumerate(kinds):
        if kind not in OTHER:
            groups[_layer(_changed(fields, per_layer.get(index)), kind, family=family)] += 1
    layers = tuple(dataclasses.replace(group, count=n) for group, n in groups.items())
    other = tuple(Counter(kind for kind in kinds if kind in OTHER).items())
    if not other and not family.known and type_ in hybrid_types():
        other = ((UNLISTED, 0),)
    parameters = None if other else count_parameters(fields, layers, weights=family.weights)
    return Model(
        type=type_,
        layers=layers,
        other_layers=other,
        parameters=parameters,
        unknown=tuple(unknown),
        brings_code=brings_code,
    )


def attention_dropout(config: Mapping[str, Any], *, file: str = "config.json") -> float:
    """Read the probability with which training drops attention weights; see read_model.

    Raises:
        AttnimgError: the field is not a number below 1 (code "bad-model").
    """
    _, _, fields = _language_model(config, file)
    # MPT keeps it one level down.
    if inner := fields.mapping("attn_config"):
        fields = fields.with_changes({k: v for k, v in inner.items() if k == "attn_pdrop"})
    probability = fields.number("attention_dropout") or 0.0
    if probability >= 1:
        raise fields.refusal("attention_dropout", probability, needed="a number below 1")
    return probability


def _language_model(config: Mapping[str, Any], file: str) -> tuple[str, Family, Fields]:
    """Find the language model of a config, its family, and the name that people know."""
    families = read_families()
    outer = Fields(config=config, defaults={}, file=file)
    type_ = _model_type(outer)
    part = next((name for name in _LANGUAGE_PARTS if config.get(name) is not None), None)
    inner = outer.mapping(part) if part else None
    if part is None or inner is None:
        family = families.get(type_) or families.get(f"{type_}_text") or Family(known=False)
        return type_, family, Fields(config=config, defaults=family.defaults, file=file)
    inner_type = _model_type(Fields(config=inner, defaults={}, file=file, part=part))
    # Older checkpoints give the part no type, or the whole model's.
    names = (inner_type, f"{inner_type}_text", f"{type_}_text")
    family = next((families[name] for name in names if name in families), Family(known=False))
    return type_, family, Fields(config=inner, defaults=family.defaults, file=file, part=part)


def _model_type(fields: Fields) -> str:
    value = fields.config.get("model_type")
    if not isinstance(value, str | None):
        raise fields.refusal("model_type", value, needed="a string")
    return value or "unknown"


def _missing(fields: Fields) -> str | None:
    for name in ("num_hidden_layers", "num_attention_heads"):
        if fields.whole(name) is None:
            return name
    mla = fields.whole("qk_nope_head_dim", minimum=0) is not None
    if not mla and fields.whole("head_dim") is None and fields.whole("hidden_size") is None:
        return "head_dim and no hidden_size"
    return None


def _per_layer_changes(fields: Fields, kinds: list[str]) -> dict[int, Mapping[str, Any]]:
    """Collect what single layers do differently: layer index -> field -> value."""
    listed = fields.mapping("per_layer_config")
    if listed is not None:
        if not all(key.isdecimal() and isinstance(value, dict) for key, value in listed.items()):
            needed = "objects under layer numbers"
            raise fields.refusal("per_layer_config", dict(listed), needed=needed)
        return {int(key): value for key, value in listed.items()}
    # gemma4 as its first checkpoints wrote it: full layers have heads of their own.
    # Source: Gemma4TextConfig.__post_init__ of transformers 5.22.2 (2026-11-21).
    full: dict[str, Any] = {}
    if head_dim := fields.whole("global_head_dim"):
        full["head_dim"] = head_dim
        if fields.flag("attention_k_eq_v") and fields.whole("num_global_key_value_heads"):
            full["num_key_value_heads"] = fields.whole("num_global_key_value_heads")
    return {i: full for i, kind in enumerate(kinds) if kind == "full_attention"} if full else {}


def _changed(fields: Fields, changes: Mapping[str, Any] | None) -> Fields:
    return fields.with_changes(changes) if changes else fields


def _layer(fields: Fields, kind: str, *, family: Family) -> LayerGroup:
    """Read one layer; the caller counts them."""
    heads = fields.whole("num_attention_heads") or 1
    size = (fields.whole("hidden_size") or 0) // heads
    nope = fields.whole("qk_nope_head_dim", minimum=0)
    rope = fields.whole("qk_rope_head_dim", minimum=0)
    if nope is not None and rope is not None:
        # MLA: every query head has a key and a value of its own; head_dim there is the rotary part.
        head_dim, kv_heads = nope + rope, heads
        head_dim_v = fields.whole("v_head_dim") or size
    else:
        head_dim = fields.whole("head_dim") or size
        head_dim_v = fields.whole("v_head_dim") or head_dim
        kv_heads = fields.whole("num_key_value_heads") or heads
        if fields.flag("multi_query") and not fields.flag("new_decoder_architecture"):
            kv_heads = 1  # falcon and gpt_bigcode, whatever their number of kv heads says
    if not head_dim or not head_dim_v:
        hidden = fields.whole("hidden_size")
        raise fields.refusal("hidden_size", hidden, needed=f"at least {heads}, one for each head")
    if heads % kv_heads:
        needed = f"a divisor of the {heads} query heads"
        raise fields.refusal("num_key_value_heads", kv_heads, needed=needed)
    slides = kind in SLIDING
    return LayerGroup(
        count=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim_qk=head_dim,
        head_dim_v=head_dim_v,
        window=_window(fields, family) if slides or family.window == "every layer" else None,
        softcap=fields.number("attn_logit_softcapping") or None,
        sinks=family.sinks == "every layer" or (family.sinks == "sliding layers" and slides),
    )


def _window(fields: Fields, family: Family) -> int | None:
    if family.window_switch and not fields.flag(family.window_switch):
        return None
    return fields.whole("sliding_window", minimum=0) or None  # some write 0 for none

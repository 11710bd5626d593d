"""Read the groups of equal attention layers of a model, and its size, from its config.json.

data/families.toml has, for each model type, defaults for config.json and how layer kinds alternate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from attnimg.files import read_data
from attnimg.run_facts import LayerGroup, Model
from attnimg.selection.model_config import LANGUAGE_PARTS, Fields
from attnimg.selection.model_types import UNLISTED, hybrid_types


def read_model(config: Mapping[str, Any], *, file: str = "config.json") -> Model:
    """Return the attention layers of a decoder, from its config.json.

    Args:
        config: the raw mapping; missing fields have the defaults of transformers' class.
        file: the name of the file, for errors.

    Returns:
        Groups of equal layers in the order of their first appearance. `unknown` lists what the
        config does not say; `layers` is empty when they could not be read.

    Raises:
        AttnimgError: a field has a wrong type or contradicts another (code "bad-model").
    """
    type_, family, fields = language_model(config, file)
    fields = with_layer_types(fields, listed_in=family.listed_in)
    auto_map = Fields(config=config, defaults={}, file=file).mapping("auto_map") or {}
    unknown = []
    if not family.known:
        unknown.append(f"model_type {type_!r} is not in the table; it was read by the general rule")
    if fields.flag("is_encoder_decoder"):
        unknown.append("it has an encoder as well; cross-attention was not looked at")
    layers: tuple[LayerGroup, ...] = ()
    other: tuple[tuple[str, int], ...] = ()
    parameters = None
    count = fields.whole("num_hidden_layers")
    if not family.attention:
        other = (("mamba", count or 0),)
    elif missing := _missing(fields):
        unknown.append(f"{file} has no {missing}, so its attention layers are not known")
    else:
        kinds = layer_kinds(fields, family)
        unknown.extend(remarks_on(kinds, fields))
        layers = _groups(fields, kinds, family)
        other = tuple(Counter(kind for kind in kinds if kind in OTHER).items())
        if not other and not family.known and type_ in hybrid_types():
            other = ((UNLISTED, 0),)
        parameters = None if other else _parameters(fields, layers, family)
    return Model(
        type=type_,
        layers=layers,
        other_layers=other,
        parameters=parameters,
        unknown=tuple(unknown),
        brings_code="AutoModelForCausalLM" in auto_map,
    )


def read_attention_dropout(config: Mapping[str, Any], *, file: str = "config.json") -> float:
    """Return the attention dropout of a model; see read_model for the arguments.

    Raises:
        AttnimgError: the field is not a number below 1 (code "bad-model").
    """
    _, _, fields = language_model(config, file)
    # MPT has it in attn_config.
    if inner := fields.mapping("attn_config"):
        fields = fields.with_changes({k: v for k, v in inner.items() if k == "attn_pdrop"})
    probability = fields.number("attention_dropout") or 0.0
    if probability >= 1:
        raise fields.refusal("attention_dropout", probability, needed="a number below 1")
    return probability


def language_model(config: Mapping[str, Any], file: str) -> tuple[str, Family, Fields]:
    """Return the model's type, and the family and the fields of its language model."""
    families = read_families()
    outer = Fields(config=config, defaults={}, file=file)
    type_ = outer.text("model_type") or "unknown"
    part = next((name for name in LANGUAGE_PARTS if config.get(name) is not None), None)
    inner = outer.mapping(part) if part else None
    names: tuple[str, ...] = (type_, f"{type_}_text")
    fields = outer
    if inner is not None:
        fields = Fields(config=inner, defaults={}, file=file, part=part)
        inner_type = fields.text("model_type") or "unknown"
        # In older checkpoints the part has no type, or that of the whole model.
        names = (inner_type, f"{inner_type}_text", f"{type_}_text")
    family = next((families[name] for name in names if name in families), Family(known=False))
    return type_, family, replace(fields, defaults=family.defaults)


def _missing(fields: Fields) -> str | None:
    for name in ("num_hidden_layers", "num_attention_heads"):
        if fields.whole(name) is None:
            return name
    mla = fields.whole("qk_nope_head_dim", minimum=0) is not None
    if not mla and fields.whole("head_dim") is None and fields.whole("hidden_size") is None:
        return "head_dim and no hidden_size"
    return None


def _groups(fields: Fields, kinds: Sequence[str], family: Family) -> tuple[LayerGroup, ...]:
    """Return the attention layers, with equal ones in one group."""
    changes = _per_layer_changes(fields, kinds)
    counts = Counter(
        _layer(fields.with_changes(changes[i]) if i in changes else fields, kind, family=family)
        for i, kind in enumerate(kinds)
        if kind not in OTHER
    )
    return tuple(replace(group, count=count) for group, count in counts.items())


def _per_layer_changes(fields: Fields, kinds: Sequence[str]) -> dict[int, Mapping[str, Any]]:
    """Return the fields that single layers override: layer index -> field -> value."""
    listed = fields.mapping("per_layer_config")
    if listed is not None:
        if not all(key.isdecimal() and isinstance(value, dict) for key, value in listed.items()):
            needed = "objects under layer numbers"
            raise fields.refusal("per_layer_config", dict(listed), needed=needed)
        # Looked up as text: int() raises for thousands of digits.
        return {i: listed[str(i)] for i in range(len(kinds)) if str(i) in listed}
    # In the first checkpoints of gemma4, full-attention layers have their own head sizes.
    # Source: Gemma4TextConfig.__post_init__ of transformers 5.22.2 (2026-11-21).
    full: dict[str, Any] = {}
    if head_dim := fields.whole("global_head_dim"):
        full["head_dim"] = head_dim
        if fields.flag("attention_k_eq_v") and fields.whole("num_global_key_value_heads"):
            full["num_key_value_heads"] = fields.whole("num_global_key_value_heads")
    return {i: full for i, kind in enumerate(kinds) if kind == "full_attention"} if full else {}


def _layer(fields: Fields, kind: str, *, family: Family) -> LayerGroup:
    """Return one layer as a group of one."""
    heads = fields.whole("num_attention_heads") or 1
    size = (fields.whole("hidden_size") or 0) // heads
    nope = fields.whole("qk_nope_head_dim", minimum=0)
    rope = fields.whole("qk_rope_head_dim", minimum=0)
    if nope is not None and rope is not None:
        # MLA: every query head has its own key and value; head_dim is that of the rotary part.
        head_dim, kv_heads = nope + rope, heads
        head_dim_v = fields.whole("v_head_dim") or size
    else:
        head_dim = fields.whole("head_dim") or size
        head_dim_v = fields.whole("v_head_dim") or head_dim
        kv_heads = fields.whole("num_key_value_heads") or heads
        if fields.flag("multi_query") and not fields.flag("new_decoder_architecture"):
            kv_heads = 1  # falcon and gpt_bigcode, whatever num_kv_heads is
    if not head_dim or not head_dim_v:
        hidden = fields.whole("hidden_size")
        raise fields.refusal("hidden_size", hidden, needed=f"at least {heads}, one for each head")
    if heads % kv_heads:
        needed = f"a divisor of the {heads} query heads"
        raise fields.refusal("num_key_value_heads", kv_heads, needed=needed)
    slides = kind in SLIDING
    window = None
    if (slides or family.window == "every layer") and (
        not family.window_switch or fields.flag(family.window_switch)
    ):
        window = fields.whole("sliding_window", minimum=0) or None  # some configs have 0 for none
    return LayerGroup(
        count=1,
        heads=heads,
        kv_heads=kv_heads,
        head_dim_qk=head_dim,
        head_dim_v=head_dim_v,
        window=window,
        softcap=fields.number("attn_logit_softcapping") or None,
        sinks=family.sinks == "every layer" or (family.sinks == "sliding layers" and slides),
    )


def _parameters(fields: Fields, layers: Sequence[LayerGroup], family: Family) -> int | None:
    """Return a rough count of embeddings, attention and MLP weights, without norms and biases.

    Returns:
        The count, within 2 % of the model's own; None when a size is missing.
    """
    hidden, vocabulary = fields.whole("hidden_size"), fields.whole("vocab_size")
    mlps = _mlps(fields, sum(group.count for group in layers), weights=family.weights)
    if hidden is None or vocabulary is None or mlps is None:
        return None
    embeddings = vocabulary * hidden * (1 if fields.flag("tie_word_embeddings") else 2)
    attention = sum(g.count * _attention(fields, g, hidden=hidden) for g in layers)
    return embeddings + attention + mlps * hidden


def _attention(fields: Fields, group: LayerGroup, *, hidden: int) -> int:
    """Return the number of weights in the projections of one layer."""
    out = group.heads * group.head_dim_v * hidden
    q = group.heads * group.head_dim_qk
    latent = fields.whole("kv_lora_rank")
    if latent is None:
        return hidden * (q + group.kv_heads * (group.head_dim_qk + group.head_dim_v)) + out
    # MLA: keys and values are projected from a shared latent vector, queries from another one or
    # directly from the hidden state.
    rotary = fields.whole("qk_rope_head_dim", minimum=0) or 0
    kv = hidden * (latent + rotary)
    kv += latent * group.heads * (group.head_dim_qk - rotary + group.head_dim_v)
    q_latent = fields.whole("q_lora_rank")
    return kv + out + (q * hidden if q_latent is None else q_latent * (hidden + q))


def _mlps(fields: Fields, count: int, *, weights: str | None) -> int | None:
    """Return the number of weights of all MLPs and routers, divided by hidden_size."""
    if weights is None:  # checked first, as intermediate_size may then be a list
        return None
    wide = fields.whole("intermediate_size")
    if wide is None or weights == "dense":
        return wide and count * 3 * wide
    experts = fields.whole("num_experts")
    if experts is None:
        return None
    narrow = fields.whole("moe_intermediate_size") or wide
    shared = fields.whole("n_shared_experts", minimum=0) or 0
    dense = min(fields.whole("first_k_dense_replace", minimum=0) or 0, count)
    routed = (experts + shared) * 3 * narrow + experts
    return dense * 3 * wide + (count - dense) * routed


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


@cache
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
    if not all(
        isinstance(numbers, list) and all(type(number) is int for number in numbers)
        for numbers in (full, linear)
    ):
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

"""Read the tables of model types and quantization methods, without importing transformers.

`make classes` generates data/model_classes.toml, causal_types.toml, positions.toml and
tokenizer_classes.toml from the pinned transformers; config/class_rules.py reads the last.
data/quantizations.toml has a row for each of its quantization methods. data/refused_types.toml has
the types that are refused before their weights are loaded, with the reasons; `make families` finds
missing ones: it trains every type of the pinned transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from attnimg.facts import Finding
from attnimg.files import read_data
from attnimg.run_facts import ModelClass
from attnimg.selection.model_config import LANGUAGE_PARTS

# The kind of layers that a model type has, but that its config lists in no known way.
UNLISTED = "unlisted"

Refuses = Literal["training", "packing", "mask"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalTypes:
    """The causal language models of transformers.

    Attributes:
        causal: model type -> class that AutoModelForCausalLM loads.
        two_sided: those of them with bidirectional attention or an encoder, unless their
            config.json has is_decoder: true.
        with_other_inputs: model type -> class of models with image or audio inputs that
            AutoModelForCausalLM does not load.
        multimodal: model type -> class of models with image or audio inputs of which
            AutoModelForCausalLM loads only the language model.
        text_trained: those of with_other_inputs that `make test/reload` trains on text.
    """

    causal: Mapping[str, str]
    two_sided: frozenset[str]
    with_other_inputs: Mapping[str, str]
    multimodal: Mapping[str, str]
    text_trained: frozenset[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionTable:
    """The position embedding table of a model type, which limits the length of its rows.

    Attributes:
        keys: fields of config.json that have the number of positions, in order of precedence.
        default: the number of positions where config.json has none of these fields.
        reserved: how many positions are reserved, that is, no token has them. If it is not 0 and
            config.json has a pad_token_id, pad_token_id + 1 positions are reserved.
    """

    keys: tuple[str, ...]
    default: int
    reserved: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """A row of data/quantizations.toml; the file explains its keys."""

    loaded: Literal["dequantized", "kept", "refused"]
    source: str
    packages: tuple[str, ...] = ()
    bits: int | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RefusedTypes:
    """A row of data/refused_types.toml; the file explains its keys."""

    types: list[str]
    refuses: Refuses
    found: str
    do: str
    source: str
    code: str | None = None
    packages: list[str] | None = None
    rows_up_to: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OtherKind:
    """A row of data/other_layers.toml; the file explains its keys."""

    label: str
    types: list[str]
    packages: list[str]
    batch: list[str]
    source: str
    modules: tuple[str, ...] = ()
    every: bool = False


def find_class(model_type: str) -> ModelClass | None:
    """Return the class of a model type; None if it supports everything or is unknown."""
    row = read_data("model_classes.toml").get(model_type)
    if row is None:
        return None
    return ModelClass(
        name=row["name"],
        lacks=frozenset(row.get("lacks", ())),
        flash_names=tuple(row.get("flash_names", ())),
    )


def read_causal_types() -> CausalTypes:
    """Read data/causal_types.toml."""
    found = read_data("causal_types.toml")
    sets = {name: frozenset(found[name]) for name in ("two_sided", "text_trained")}
    return CausalTypes(**found | sets)


def position_table(model_type: str) -> PositionTable | None:
    """Return a row of data/positions.toml; None for a type without such a table."""
    row = read_data("positions.toml").get(model_type)
    return PositionTable(**row | {"keys": tuple(row["keys"])}) if row else None


@cache
def quantizations() -> Mapping[str, Quantization]:
    """Return data/quantizations.toml: quant_method -> what happens to such a checkpoint."""
    return {
        name: Quantization(**row | {"packages": tuple(row.get("packages", ()))})
        for name, row in read_data("quantizations.toml").items()
    }


def find_quantization(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the quantization_config of a config.json, None where it has none.

    It may be in the config of the language model; older versions of llm-compressor call it
    compression_config.

    Args:
        raw: the config.json.
    """
    for config in _with_language_parts(raw):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := config.get(key), Mapping) and found:
                return found
    return None


def _with_language_parts(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return a config.json, and the config of its language model if it has one."""
    parts = (part for name in LANGUAGE_PARTS if isinstance(part := raw.get(name), Mapping))
    return (raw, *parts)


def quantization_method(quantization: Mapping[str, Any]) -> str:
    """Return the quantization method of a quantization_config; "none named" if it has none."""
    for bits in (4, 8):
        if quantization.get(f"load_in_{bits}bit"):
            return f"bitsandbytes_{bits}bit"
    return str(quantization.get("quant_method") or "none named")


def weight_bits(quantization: Mapping[str, Any]) -> int | None:
    """Return the number of bits of a checkpoint's weights; None if its config does not say.

    gptq and awq: {"bits": 4}, in old configs {"w_bit": 4}. torchao names a class: {"quant_type":
    {"default": {"_type": "Int8DynamicActivationInt4WeightConfig"}}} has weights of 4 bits.
    Source: transformers 5.22.2, quantizer_torchao.py, _fuzzy_match_size (2026-11-28).
    """
    for key in ("bits", "w_bit"):
        if isinstance(bits := quantization.get(key), int):
            return bits
    kind = quantization.get("quant_type")
    named = str(kind.get("default", kind).get("_type", "")) if isinstance(kind, Mapping) else ""
    bits = re.search(r"(\d)weight", named.lower())
    return int(bits[1]) if bits else None


@cache
def refused_types() -> dict[str, RefusedTypes]:
    """Return data/refused_types.toml: reason -> row."""
    return {name: RefusedTypes(**row) for name, row in read_data("refused_types.toml").items()}


def needed_packages() -> frozenset[str]:
    """Return the distributions that some model types or quantized checkpoints require."""
    named = [row.packages for row in quantizations().values()]
    named += [tuple(row.packages or ()) for row in refused_types().values()]
    return frozenset(re.split("[<>=]", name)[0] for names in named for name in names)


def find_refusal(
    raw: Mapping[str, Any],
    *,
    name: str,
    packing: bool,
    sequence_len: int,
    packages: Mapping[str, str] | None,
) -> Finding | None:
    """Return the error for a run with a model of a refused type; None if the model is allowed.

    Args:
        raw: the model's config.json.
        name: base_model, for the message.
        packing: whether rows hold several documents.
        sequence_len: tokens of the longest row.
        packages: the installed distributions; None if all are assumed to be installed.
    """
    for part in _with_language_parts(raw):
        type_ = str(part.get("model_type"))
        row = _find_row(type_, "training")
        missing = row is not None and packages is not None and {*(row.packages or ())} - {*packages}
        if row is not None and (row.packages is None or missing):
            return _not_trainable(row, name=name, model_type=type_)
        if not packing or (row := _find_row(type_, "packing")) is None:
            continue
        limit = part.get(row.rows_up_to) if row.rows_up_to else None
        if row.rows_up_to is None:
            return _not_packable(row, type_)
        if isinstance(limit, int) and sequence_len > limit:
            bound = f"; {row.rows_up_to} is {limit}, sequence_len {sequence_len}"
            do = f"{row.do}, or sequence_len: {limit}"
            return _not_packable(row, type_, bound=bound, do=do)
    return None


def mask_refusal(model_type: str) -> Finding | None:
    """Return the error for a packed run whose backend isolates documents by transformers' mask."""
    row = _find_row(model_type, "mask")
    return _not_packable(row, model_type) if row else None


def _find_row(model_type: str, refuses: Refuses) -> RefusedTypes | None:
    """Return the row of a refused type; the caller checks its conditions."""
    rows = refused_types().values()
    return next((row for row in rows if row.refuses == refuses and model_type in row.types), None)


def _not_trainable(row: RefusedTypes, *, name: str, model_type: str) -> Finding:
    causal = row.code == "not-causal-lm"
    return Finding(
        code=row.code or "not-trainable",
        key="base_model",
        what=f"{name} (model_type {model_type}) "
        + ("is not a causal language model" if causal else "cannot be trained here"),
        why=f"found: {row.found}\nneeded: a model that predicts each token from those before it "
        f"[{_source(row, model_type)}]",
        do=row.do,
    )


def _not_packable(row: RefusedTypes, model_type: str, *, bound: str = "", do: str = "") -> Finding:
    return Finding(
        code="packing-not-isolated",
        key="sample_packing",
        what=f"packed documents would mix in {model_type}",
        why=f"found: {row.found}{bound}\n"
        f"needed: the same logits for a document packed and alone [{_source(row, model_type)}]",
        do=do or row.do,
    )


def _source(row: RefusedTypes, model_type: str) -> str:
    return row.source.replace("{file}", f"modeling_{model_type.replace('-', '_')}.py")


def hybrid_types() -> frozenset[str]:
    """Return the model types that have, or may have, layers without softmax attention."""
    return frozenset(name for row in other_layer_kinds().values() for name in row.types)


@cache
def other_layer_kinds() -> dict[str, OtherKind]:
    """Return data/other_layers.toml: name -> kind of layers without softmax attention."""
    return {name: OtherKind(**row) for name, row in read_data("other_layers.toml").items()}

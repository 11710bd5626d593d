"""Which models transformers has, and what their classes do not take, without importing it.

data/model_classes.toml, causal_types.toml and positions.toml are read off the pinned transformers
by `make classes`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from attnimg.facts import ModelClass


@dataclass(frozen=True, kw_only=True, slots=True)
class CausalTypes:
    """The causal language models of transformers.

    Attributes:
        causal: model type -> class that AutoModelForCausalLM loads.
        two_sided: those of them that attend to both sides, or have an encoder, unless their
            config.json says is_decoder.
        with_other_inputs: model type -> class of those that also take images or sound, which
            AutoModelForCausalLM does not load.
        multimodal: model type -> class of those that also take images or sound, and of which
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
    """The table of positions of a model type, which limits the length of its rows.

    Attributes:
        keys: fields of config.json that have the number of positions, in order of precedence.
        default: the number of positions where config.json has none of these fields.
        reserved: how many positions no token can have where config.json has no pad_token_id; if
            this is not 0 and it has one, pad_token_id + 1 positions are reserved.
    """

    keys: tuple[str, ...]
    default: int
    reserved: int = 0


def position_table(model_type: str) -> PositionTable | None:
    """Read a row of data/positions.toml; None for a type without such a table."""
    path = resources.files("attnimg").joinpath("data", "positions.toml")
    row = tomllib.loads(path.read_text(encoding="utf-8")).get(model_type)
    return PositionTable(**row | {"keys": tuple(row["keys"])}) if row else None


def read_causal_types() -> CausalTypes:
    """Read data/causal_types.toml."""
    path = resources.files("attnimg").joinpath("data", "causal_types.toml")
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return CausalTypes(
        causal=found["causal"],
        two_sided=frozenset(found["two_sided"]),
        with_other_inputs=found["with_other_inputs"],
        multimodal=found["multimodal"],
        text_trained=frozenset(found["text_trained"]),
    )


def class_named(model_type: str) -> ModelClass | None:
    """Give the class of a model type; None when it takes everything, or is not transformers'."""
    path = resources.files("attnimg").joinpath("data", "model_classes.toml")
    found = tomllib.loads(path.read_text(encoding="utf-8")).get(model_type)
    if found is None:
        return None
    return ModelClass(
        name=found["name"],
        lacks=frozenset(found.get("lacks", ())),
        flash_names=tuple(found.get("flash_names", ())),
    )

"""Which model types are refused before their weights are loaded: for training, or for packed rows.

data/refused_types.toml lists them with the reasons. `make families` trains every type of the
pinned transformers, and so finds types that are missing there.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from attnimg.facts import Finding

Refuses = Literal["training", "packing", "mask"]


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


def row_of(model_type: str, refuses: Refuses) -> RefusedTypes | None:
    """Return the row that refuses a type, before its conditions are checked; None without one."""
    return next(
        (row for row in rows().values() if row.refuses == refuses and model_type in row.types), None
    )


def refusal_of(
    raw: Mapping[str, Any],
    *,
    name: str,
    packing: bool,
    sequence_len: int,
    packages: Mapping[str, str] | None,
) -> Finding | None:
    """Return the error of a run with this model; None where it may run.

    Args:
        raw: the model's config.json.
        name: base_model, for the message.
        packing: whether rows hold several documents.
        sequence_len: tokens of the longest row.
        packages: the installed distributions; None assumes that all are.
    """
    text = raw.get("text_config")
    parts = [raw, *([text] if isinstance(text, Mapping) else [])]
    for part in parts:
        type_ = str(part.get("model_type"))
        row = row_of(type_, "training")
        if row is not None and _applies(row, packages):
            return _not_trainable(row, name=name, model_type=type_)
        row = row_of(type_, "packing") if packing else None
        if row is not None and _too_long(row, part, sequence_len):
            return _not_packable(row, part, model_type=type_, sequence_len=sequence_len)
    return None


def mask_refusal(model_type: str) -> Finding | None:
    """Return the error of a packed run whose backend separates documents by transformers' mask."""
    row = row_of(model_type, "mask")
    return _not_packable(row, {}, model_type=model_type, sequence_len=0) if row else None


def _applies(row: RefusedTypes, packages: Mapping[str, str] | None) -> bool:
    if row.packages is None:
        return True
    return packages is not None and not packages.keys() >= {*row.packages}


def _too_long(row: RefusedTypes, part: Mapping[str, Any], sequence_len: int) -> bool:
    if row.rows_up_to is None:
        return True
    limit = part.get(row.rows_up_to)
    return isinstance(limit, int) and sequence_len > limit


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


def _not_packable(
    row: RefusedTypes, part: Mapping[str, Any], *, model_type: str, sequence_len: int
) -> Finding:
    field, do = row.rows_up_to, row.do
    bound = ""
    if field is not None:
        bound = f"; {field} is {part[field]}, sequence_len {sequence_len}"
        do = f"{do}, or sequence_len: {part[field]}"
    return Finding(
        code="packing-not-isolated",
        key="sample_packing",
        what=f"packed documents would mix in {model_type}",
        why=f"found: {row.found}{bound}\n"
        f"needed: the same logits for a document packed and alone [{_source(row, model_type)}]",
        do=do,
    )


def _source(row: RefusedTypes, model_type: str) -> str:
    return row.source.replace("{file}", f"modeling_{model_type.replace('-', '_')}.py")


def packages() -> frozenset[str]:
    """Return the distributions whose absence refuses a type."""
    return frozenset(package for row in rows().values() for package in row.packages or ())


@cache
def rows() -> dict[str, RefusedTypes]:
    """Read data/refused_types.toml: reason -> row."""
    path = resources.files("attnimg").joinpath("data", "refused_types.toml")
    return {
        name: RefusedTypes(**row) for name, row in tomllib.loads(path.read_text("utf-8")).items()
    }

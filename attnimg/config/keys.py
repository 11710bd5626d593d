"""List the config keys: those that the schema implements, and known ones that are refused."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from attnimg.config.attention import LEGACY
from attnimg.config.schema import Config, DatasetSpec

# Computed from the backend; a config can't set them.
COMPUTED = ("attn_supports_packing", "attn_uses_flash_lib", "attn_needs_dtype_cast")
# Keys of the schema that are also in data/keys.toml, which refuses them after their own rules. That
# file has no other key of the schema, so most configs can be checked without reading it.
IN_SCHEMA = frozenset({"rl", "context_parallel_size", "scaling_softmax"})


@dataclass(frozen=True, kw_only=True, slots=True)
class UnsupportedKey:
    """A known key that is not implemented: what to do instead, and values without effect."""

    do: str
    accepts: tuple[Any, ...] = ()


@cache
def unsupported_keys() -> dict[str, UnsupportedKey]:
    """Return the top-level keys that are known but not implemented."""
    table = _table()
    accepts = table["accepts"]
    return {
        key: UnsupportedKey(do=group["do"], accepts=tuple(accepts.get(key, ())))
        for group in table["group"]
        for key in group["keys"]
    }


@cache
def unsupported_dataset_keys() -> dict[str, UnsupportedKey]:
    """Return the keys of a dataset entry that are known but not implemented."""
    table = _table()["dataset"]
    return {key: UnsupportedKey(do=table["do"]) for key in table["keys"]}


def nearest_key(key: str, *, dataset: bool = False) -> str | None:
    """Return the known key that is most similar to `key`; None when none is similar."""
    name = key.strip().lower()
    if not dataset and (synonym := _table()["synonyms"].get(name)):
        return str(synonym)
    fields = DatasetSpec.model_fields if dataset else {**Config.model_fields, **LEGACY}
    others = unsupported_dataset_keys() if dataset else unsupported_keys()
    # Implemented keys come first, so that they are suggested if two keys are equally similar.
    for known in (fields, others):
        if matches := get_close_matches(name, known, n=1, cutoff=0.75):
            return matches[0]
    return None


@cache
def _table() -> dict[str, Any]:
    from attnimg.files import read_data  # here, because most configs are checked without it

    return read_data("keys.toml")

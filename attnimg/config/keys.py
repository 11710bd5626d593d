"""Which keys exist: those the schema implements, and those that are refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from attnimg.config.attention import LEGACY
from attnimg.config.schema import Config, DatasetSpec

# What other trainers call a key of ours.
SYNONYMS = {
    "attn_impl": "attn_implementation",
    "batch_size_per_device": "micro_batch_size",
    "batchsize": "micro_batch_size",
    "epochs": "num_epochs",
    "lr": "learning_rate",
    "max_length": "sequence_len",
    "max_seq_length": "sequence_len",
    "model": "base_model",
    "model_name_or_path": "base_model",
    "num_train_epochs": "num_epochs",
    "packing": "sample_packing",
    "per_device_train_batch_size": "micro_batch_size",
    "seq_len": "sequence_len",
    "xformers": "attn_implementation",
}
# Computed from the backend, never written by hand.
COMPUTED = ("attn_supports_packing", "attn_uses_flash_lib", "attn_needs_dtype_cast")
# Keys of the schema that data/keys.toml refuses too, after their own rules. It has no other key of
# the schema, so that it need not be read for most configs.
IN_SCHEMA = frozenset({"rl", "context_parallel_size", "scaling_softmax"})


@dataclass(frozen=True, kw_only=True, slots=True)
class UnsupportedKey:
    """A key that is known and not implemented: what to do instead, and harmless values."""

    do: str
    accepts: tuple[Any, ...] = ()


@cache
def unsupported_keys() -> dict[str, UnsupportedKey]:
    """Return the top-level keys that are refused by name."""
    table = _table()
    accepts = table["accepts"]
    return {
        key: UnsupportedKey(do=group["do"], accepts=tuple(accepts.get(key, ())))
        for group in table["group"]
        for key in group["keys"]
    }


@cache
def unsupported_dataset_keys() -> dict[str, UnsupportedKey]:
    """Return the keys of one data set that are refused by name."""
    table = _table()["dataset"]
    return {key: UnsupportedKey(do=table["do"]) for key in table["keys"]}


def nearest_key(key: str, *, dataset: bool = False) -> str | None:
    """Return the known key most like `key`; None when none is similar."""
    name = key.strip().lower()
    if not dataset and name in SYNONYMS:
        return SYNONYMS[name]
    fields = DatasetSpec.model_fields if dataset else {**Config.model_fields, **LEGACY}
    others = unsupported_dataset_keys() if dataset else unsupported_keys()
    # Implemented keys first: of two equally near ones, the one that works is meant.
    for known in (fields, others):
        if matches := get_close_matches(name, known, n=1, cutoff=0.75):
            return matches[0]
    return None


@cache
def _table() -> dict[str, Any]:
    import tomllib
    from importlib.resources import files

    return tomllib.loads((files("attnimg") / "data" / "keys.toml").read_text("utf-8"))

"""The fields of a config.json under any of their names, each checked for its type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnimg.errors import AttnimgError

# llama's name -> what other families call it.
_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "n_embed", "d_model"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads", "attention_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "head_dim": ("d_kv", "attention_head_dim"),
    "layer_types": ("layers_block_type",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "attention_dropout": ("attn_pdrop", "attention_probs_dropout_prob"),
}
# No model is near it; a typo of this size would otherwise fill the memory.
_MAX_WHOLE = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Fields:
    """A config and what is assumed for the fields it leaves out.

    Attributes:
        config: the raw mapping.
        defaults: field -> assumed value, under llama's names.
        file: how an error names the file.
        part: the mapping's own name when it is but a part of it, "text_config".
    """

    config: Mapping[str, Any]
    defaults: Mapping[str, Any]
    file: str = "config.json"
    part: str | None = None

    def with_changes(self, changes: Mapping[str, Any]) -> Fields:
        """Lay one layer's own values over the model's."""
        names = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}
        hidden = {names.get(key, key) for key in changes}
        kept = {k: v for k, v in self.config.items() if names.get(k, k) not in hidden}
        return replace(self, config={**kept, **changes})

    def whole(self, name: str, *, minimum: int = 1) -> int | None:
        """Read a whole number; None when the field is absent or null.

        Raises:
            AttnimgError: it is something else, or out of range (code "bad-model").
        """
        key, value = self._find(name)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value <= _MAX_WHOLE:
            raise self.refusal(key, value, needed=f"a whole number of at least {minimum}")
        return value

    def number(self, name: str) -> float | None:
        """Read a number of at least 0; None when the field is absent or null."""
        key, value = self._find(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise self.refusal(key, value, needed="a number of at least 0")
        return float(value)

    def flag(self, name: str) -> bool:
        """Read true or false; absent and null are false."""
        key, value = self._find(name)
        if value not in (None, True, False):
            raise self.refusal(key, value, needed="true or false")
        return bool(value)

    def names(self, name: str) -> list[str] | None:
        """Read a list of strings; None when the field is absent, null or empty."""
        key, value = self._find(name)
        if not isinstance(value, list | None) or not all(isinstance(v, str) for v in value or []):
            raise self.refusal(key, value, needed="a list of strings")
        return value or None

    def flags(self, name: str) -> list[bool] | None:
        """Read a list of 0 and 1; None when the field is absent, null or empty."""
        key, value = self._find(name)
        if not isinstance(value, list | None) or not all(v in (0, 1) for v in value or []):
            raise self.refusal(key, value, needed="a list of 0 and 1")
        return [bool(v) for v in value] if value else None

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        """Read an object; None when the field is absent or null."""
        key, value = self._find(name)
        if not isinstance(value, dict | None):
            raise self.refusal(key, value, needed="an object of named fields")
        return value

    def refusal(self, key: str, value: object, *, needed: str) -> AttnimgError:
        """Say that a field holds what it can't hold."""
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return self._refusal(key, why=f"found {shown}; needed {needed}")

    def wrong_length(self, key: str, found: int, *, count: int) -> AttnimgError:
        """Say that a list does not have one entry for each of `count` layers."""
        why = f"found {found} entries; needed {count}, one for each of num_hidden_layers"
        return self._refusal(key, why=why)

    def _refusal(self, key: str, *, why: str) -> AttnimgError:
        where = f"{self.file}: {self.part}" if self.part else self.file
        return AttnimgError(
            f"{where}: {key} cannot be used",
            why=why,
            do=f"correct {key} in the model's {self.file}",
            code="bad-model",
            key="base_model",
        )

    def _find(self, name: str) -> tuple[str, Any]:
        """Give the name that the config uses and its value; the assumed one where it uses none."""
        present = [key for key in (name, *_ALIASES.get(name, ())) if key in self.config]
        for key in present:
            if self.config[key] is not None:
                return key, self.config[key]
        return name, None if present else self.defaults.get(name)

"""Rename added tokens of a tokenizer, such as reserved ones (added_tokens_overrides).

Source: axolotl 0.19.0, loaders/tokenizer.py, modify_tokenizer_files (2026-11-27)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.errors import AttnimgError, bad_value

KEY = "added_tokens_overrides"


def rename_tokens(tokenizer: Any, names: Mapping[int, str]) -> None:
    """Rename added tokens of a tokenizer; their ids stay the same.

    Args:
        tokenizer: a fast tokenizer of transformers.
        names: id of a token -> its new name.

    Raises:
        AttnimgError: code bad-value.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    special = {str(token) for token in tokenizer.special_tokens_map.values()}
    vocabulary = state["model"].get("vocab")
    for number, name in names.items():
        old = added[number]["content"] if number in added else None
        if old is None or old in special:
            raise _not_free(number, old, [n for n in added if added[n]["content"] not in special])
        if name != old and name in tokenizer.get_vocab():
            raise bad_value(
                KEY,
                f"{KEY}: the tokenizer has a token {name!r} already",
                why=f"found it as {tokenizer.convert_tokens_to_ids(name)}; needed a new name",
                do=f"write another name for {number} in {KEY}",
            )
        added[number]["content"] = name
        if isinstance(vocabulary, dict) and vocabulary.get(old) == number:
            vocabulary[name] = vocabulary.pop(old)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _not_free(number: int, old: str | None, free: list[int]) -> AttnimgError:
    found = (
        "no added token with that id"
        if old is None
        else f"{old!r}, which is used as a special token"
    )
    shown = f"{min(free)} to {max(free)}" if free else "none"
    return bad_value(
        KEY,
        f"{KEY}: token {number} can't be renamed",
        why=f"found {found}; added tokens that can be renamed: {shown}",
        do=f"correct or remove {number} in {KEY}",
    )

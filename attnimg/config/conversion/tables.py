"""Read the tables of other trainers' keys: what happens to each key, and its default.

They are data/convert/*.toml; transformers.toml describes their form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from attnimg.files import read_data

Trainer = Literal["trl", "trl-dpo", "trl-kto", "trl-orpo", "llama-factory", "axolotl"]
Answer = Literal["done", "done-otherwise", "hint-not-used", "refused"]
# The trainers' names in messages.
NAMES: dict[Trainer, str] = {
    "trl": "TRL", "trl-dpo": "TRL's DPO", "trl-kto": "TRL's KTO", "trl-orpo": "TRL's ORPO",
    "llama-factory": "LLaMA-Factory", "axolotl": "axolotl",
}  # fmt: skip
# The trainers of TRL: supervised fine-tuning, and preferences.
OF_TRL: tuple[Trainer, ...] = ("trl", "trl-dpo", "trl-kto", "trl-orpo")
_NULL = "null"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceKey:
    """A key of another trainer.

    Attributes:
        answer: what happens to it.
        default: its default in that trainer; None for null.
        to: attnimg's keys that it becomes; empty unless the answer is done.
        how: how its value is converted; "" if it stays the same.
        reason: why it has another answer than done.
        do: what the user can do then.
        same: whether attnimg's default is the same.
        removed: whether newer versions of the trainer do not have it.
    """

    answer: Answer
    default: Any
    to: tuple[str, ...] = ()
    how: str = ""
    reason: str = ""
    do: str = ""
    same: bool = False
    removed: bool = False

    @property
    def is_plain(self) -> bool:
        """Return whether the value is copied to one of attnimg's keys."""
        return len(self.to) == 1 and not self.how


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTable:
    """All keys of a trainer.

    Attributes:
        keys: name -> what happens to it.
        renamed: older name -> name.
        templates: name of a chat template -> its texts.
    """

    keys: Mapping[str, SourceKey]
    renamed: Mapping[str, str]
    templates: Mapping[str, Mapping[str, str]]

    def name(self, key: str) -> str:
        """Return the present name of a key."""
        return self.renamed.get(key, key)


@cache
def key_table(trainer: Trainer) -> KeyTable:
    """Return the keys of a trainer of TRL or of LLaMA-Factory, with those that it shares."""
    keys: dict[str, SourceKey] = {}
    renamed: dict[str, str] = {}
    templates: dict[str, Mapping[str, str]] = {}
    shared = ("trl",) if trainer in OF_TRL[1:] else ()
    for name in ("transformers", *shared, trainer):
        table = read_data(f"convert/{name}.toml")
        for key in table.get("without", ()):
            del keys[key]
        for key, entry in table["keys"].items():
            keys[key] = SourceKey(
                answer="done",
                default=_value(entry["default"]),
                to=tuple(entry["to"]),
                how=entry.get("how", ""),
                same=entry.get("same", False),
                removed=entry.get("removed", False),
            )
        for group in table["group"]:
            for key, default in group["keys"].items():
                keys[key] = SourceKey(
                    answer=group["answer"],
                    default=_value(default),
                    reason=group["reason"],
                    do=group["do"],
                    removed=group.get("removed", False),
                )
        renamed |= table.get("renamed", {})
        templates |= table.get("template", {})
    # An older name may be the present name of another trainer's key.
    older = {old: new for old, new in renamed.items() if old not in keys}
    return KeyTable(keys=keys, renamed=older, templates=templates)


def _value(default: object) -> object:
    return None if default == _NULL else default

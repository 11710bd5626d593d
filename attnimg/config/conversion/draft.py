"""Collect the new config of a conversion, and the answer to each key of the old one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from attnimg.config.conversion.tables import (
    NAMES,
    OF_TRL,
    Answer,
    KeyTable,
    SourceKey,
    Trainer,
    key_table,
)
from attnimg.config.schema import Config, make_error
from attnimg.errors import shortened
from attnimg.facts import Finding
from attnimg.redact import MASK, is_secret_key, redact

# Reads the records of a dataset entry; none where they can't be read here.
ReadRecords = Callable[[dict[str, Any]], Iterable[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedKey:
    """What happened to one key of the old config.

    Attributes:
        key: the key, as it is written there.
        value: its value; None in place of a secret, and MASK in place of one inside it.
        answer: one of the four answers.
        to: attnimg's keys that have the value now.
        reason: how the value changed, or why the key has another answer than done.
        do: what the user can do; "" for nothing.
    """

    key: str
    value: Any
    answer: Answer
    to: tuple[str, ...]
    reason: str
    do: str


@dataclass(slots=True)
class Draft:
    """The new config while it is written.

    Attributes:
        trainer: the trainer that the old config is for.
        table: the trainer's keys.
        old: the old config, by the present names of its keys, with MASK in place of secrets.
        written: present name -> the name in the old config.
        values: the new config.
        comments: attnimg's key -> the comment above it.
        added: keys of the new config with the trainer's defaults, which the old one does not set.
        answers: key of the old config -> what happened to it.
        errors: why the config can't be converted.
        read: keys of the trainer that a rule has read; the table alone decides on the others.
    """

    trainer: Trainer
    table: KeyTable
    old: dict[str, Any]
    written: dict[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, ConvertedKey] = field(default_factory=dict)
    errors: list[Finding] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """Return the trainer's name, for messages."""
        return NAMES[self.trainer]

    def given(self, key: str) -> bool:
        """Return whether the old config sets a key."""
        return self.old.get(key) is not None

    def get(self, key: str) -> Any:
        """Return the value of a key, or its default in the trainer."""
        self.read.add(key)
        value = self.old.get(key)
        return self.table.keys[key].default if value is None else value

    def put(
        self, ours: str, value: Any, *sources: str, comment: str = "", reason: str = ""
    ) -> None:
        """Set one of our keys, from keys of the old config or from their defaults.

        Args:
            ours: our key.
            value: its value; None sets nothing.
            sources: keys of the trainer that decide the value.
            comment: for the line above it, if its meaning differs.
            reason: how the value changed, for the report.
        """
        for source in sources:
            self.answer(source, to=(ours,) if value is not None else (), reason=reason or comment)
        if value is None:
            return
        given = any(map(self.given, sources))
        default = Config.model_fields[ours].default
        if not given and (value == default or (default is None and not value)):
            return
        self.values[ours] = value
        if comment:
            self.comments[ours] = comment
        if not given:
            self.added[ours] = value

    def add_entry(self, ours: str, entries: Mapping[str, Any]) -> None:
        """Add entries to one of our keys that is a mapping, such as special_tokens."""
        if entries:
            self.values[ours] = {**self.values.get(ours, {}), **entries}

    def answer(self, key: str, *, to: tuple[str, ...] = (), reason: str = "") -> None:
        """Record that a key of the old config is done; several calls for it are joined."""
        self.read.add(key)
        if key not in self.old:
            return
        before = self.answers.get(key)
        if before is not None and before.answer != "done":
            return
        if before is not None:
            to = tuple(dict.fromkeys((*before.to, *to)))
            reason = reason or before.reason
        self._record(key, "done", to=to, reason=reason)

    def note(self, key: str, answer: Answer, *, reason: str, do: str = "") -> None:
        """Record that a key of the old config has another answer than done."""
        if key in self.old:
            to = self.answers[key].to if key in self.answers else ()
            self._record(key, answer, to=to, reason=reason, do=do)

    def refuse(self, key: str, *, why: str, do: str, code: str = "unsupported-key") -> None:
        """Record that a value can't be converted, whether it is written or a default."""
        name = self.written.get(key, key)
        if key in self.old:
            set_by = f"found {_short(self.old[key])}"
        else:
            set_by = f"{self.name}'s default is {_short(self.get(key))}"
        if self.old.get(key) == MASK:
            set_by = "found a value that is not printed, since it is a secret"
        what = f"{name} can't be converted"
        self.errors.append(make_error(code, name, what, f"{set_by}; {why}", do))
        self.note(key, "refused", reason=why, do=do)

    def _record(
        self, key: str, answer: Answer, *, to: tuple[str, ...], reason: str, do: str = ""
    ) -> None:
        value = None if self.old[key] == MASK else self.old[key]
        name = self.written.get(key, key)
        self.answers[key] = ConvertedKey(
            key=name, value=value, answer=answer, to=to, reason=reason, do=do
        )

    def refuse_secret(self, key: str, path: str) -> None:
        """Refuse a key with a secret, unless it is left out or refused for another reason.

        Args:
            key: the key.
            path: of the secret, such as "datasets[0].token".
        """
        is_done = self.answers[key].answer == "done"
        if not is_done or any(error.key == path for error in self.errors):
            return
        name = path.rpartition(".")[2].partition("[")[0]
        do = "write it without a user, a password or a token"
        if is_secret_key(name):
            do = f"remove {path}"
        self.refuse(key, why=f"{path} is a secret, which can't be in a config", do=do)

    def finish(self) -> None:
        """Answer every key of the old config that no rule has read."""
        for key in self.old:
            if key in self.answers:
                continue
            if (entry := self.table.keys.get(key)) is None:
                self._refuse_unknown(key)
            else:
                self._by_table(key, entry)
        # The default of a key that no rule has read may differ from attnimg's.
        for key, entry in self.table.keys.items():
            if key not in self.read and entry.is_plain and not entry.same:
                self.put(entry.to[0], entry.default, key)

    def _by_table(self, key: str, entry: SourceKey) -> None:
        value = self.old[key]
        if entry.answer == "done" and entry.is_plain:
            self.put(entry.to[0], value, key)
        elif value is None or value == entry.default or value in ("", [], {}):
            self.answer(key, reason=f"{self.name}'s default, which requests nothing")
        elif entry.answer == "refused":
            self.refuse(key, why=entry.reason, do=entry.do)
        elif entry.answer == "done":  # a rule did not need it
            reason = f"it has no effect in this run ({entry.how})" if entry.how else ""
            self.answer(key, reason=reason)
        else:
            self.note(key, entry.answer, reason=entry.reason, do=entry.do)

    def _refuse_unknown(self, key: str) -> None:
        similar = get_close_matches(key, self.table.keys, n=1, cutoff=0.75)
        why = f"{self.name} has no such key, and attnimg convert does not know what it means"
        do = f"did you mean {similar[0]}?" if similar else "remove it"
        others = [trainer for trainer in OF_TRL if key in key_table(trainer).keys]
        if self.trainer in OF_TRL and others:
            why = f"it is a key of {' and '.join(NAMES[trainer] for trainer in others)}"
            do = f"pass {' or '.join(f'--from {trainer}' for trainer in others)}, or remove it"
        what = f"{key if key.isprintable() and key else repr(key)} is not a key of {self.name}"
        self.errors.append(make_error("unknown-key", key, what, why, do))
        self.note(key, "refused", reason=why, do=do)


def _short(value: object) -> str:
    text = "null" if value is None else redact(repr(value))
    return shortened(text if len(text) <= 60 else f"{text[:57]}...")

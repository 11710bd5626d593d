"""What a record becomes before it is tokens, and the checks of a record's single values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnimg.train.data.records import Place, bad_record


@dataclass(frozen=True, slots=True)
class Pair:
    """A text to be answered and its answer; without a prompt, all of the text is learnt.

    Attributes:
        prompt: the text to be answered.
        completion: the answer.
        unused: the record's columns that have no effect, where a type reads several.
    """

    prompt: str | None
    completion: str
    unused: tuple[str, ...] = field(default=(), repr=False)  # not part of the data's hash


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation, its role in the chat template's terms.

    Attributes:
        role: the role.
        content: the text; None where the record has none, as beside tool calls.
        extra: the message's other keys, such as reasoning_content and tool_calls.
        train: what the record's flag says of the loss; None: as the role says.
        untrained: character spans of the content that carry no loss.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None
    untrained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a record of the type chat_template holds.

    Attributes:
        turns: the messages.
        tools: JSON schemas of the functions that the assistant may call.
        unused: the record's columns that have no effect.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


Parsed = Pair | Conversation
Parse = Callable[[Mapping[str, Any], Place], Parsed | None]


def unused_note(what: str, names: Sequence[str]) -> str:
    """Return the warning on names ("columns") that change nothing."""
    return f"these {what} have no effect: {', '.join(names)}"


def column(
    record: Mapping[str, Any], name: str, place: Place, *, needed: Sequence[str], hint: str
) -> Any:
    """Take one column of a record; the error names what is there and what is needed."""
    if name in record:
        return record[name]
    raise bad_record(
        place,
        why=f"found the columns {', '.join(record) or 'none'}; needed {', '.join(needed)}",
        do=hint,
        code="wrong-columns" if place.first else "bad-data",
    )


def text(value: object, name: str, place: Place) -> str:
    """Give a value that must be a string."""
    # Half of a surrogate pair is no character: JSON can spell it, UTF-8 and tokenizers can't.
    if isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value):
        return value
    raise bad_record(
        place,
        why=f"{name} is {shown(value)}, needed text",
        do="write it as a string, or drop the record",
    )


def shown(value: object) -> str:
    """Write a value for an error, cut to 60 characters."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 60 else written[:57] + "..."

"""Check that a record holds a conversation, and name its roles as chat templates do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.schema import DatasetSpec
from attnimg.train.data.parsed import Turn, column, shown, text
from attnimg.train.data.records import Place, bad_record

# Names of roles in ShareGPT's records, and those of chat templates.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}  # fmt: skip


def parse_turns(
    spec: DatasetSpec, record: Mapping[str, Any], place: Place
) -> tuple[Turn, ...] | None:
    """Read a conversation; None when all its turns are empty.

    Raises:
        AttnimgError: it is no list of messages with known roles, or it uses tools.
    """
    field = spec.field_messages or "messages"
    hint = (
        f"name the column of the conversation: `field_messages: {next(iter(record), 'messages')}`"
    )
    messages = column(record, field, place, needed=(field,), hint=hint)
    if isinstance(messages, str):  # some sets store the conversation as JSON text
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            messages = shown(messages)
    if not isinstance(messages, list):
        raise bad_record(
            place,
            why=f"{field} is {shown(messages)}, needed a list of messages",
            do="write a conversation as a list of objects with role and content",
        )
    if record.get("tools"):
        raise _no_tools("a list of tools", place)
    turns = tuple(
        _turn(spec, message, place, number=n) for n, message in enumerate(messages, start=1)
    )
    return turns if any(turn.content.strip() for turn in turns) else None


def _turn(spec: DatasetSpec, message: object, place: Place, *, number: int) -> Turn:
    named = {
        "role": spec.message_field_role or "role",
        "content": spec.message_field_content or "content",
    } | (spec.message_property_mappings or {})
    if not isinstance(message, Mapping):
        raise bad_record(
            place,
            why=f"message {number} is {shown(message)}, needed an object with "
            f"{named['role']} and {named['content']}",
            do="write each message as an object",
        )
    if message.get("tool_calls"):
        raise _no_tools(f"tool calls in message {number}", place)
    for name in (named["role"], named["content"]):
        if name not in message:
            raise bad_record(
                place,
                why=f"message {number} has {', '.join(message) or 'nothing'}; "
                f"needed {named['role']} and {named['content']}",
                do="say what they are called: "
                "`message_property_mappings: {role: from, content: value}`",
                code="wrong-columns" if place.first else "bad-data",
            )
    role = text(message[named["role"]], f"{named['role']} of message {number}", place)
    content = text(message[named["content"]], f"{named['content']} of message {number}", place)
    return Turn(_role(spec, role, place, number=number), content)


def roles(spec: DatasetSpec) -> dict[str, str]:
    """Map the names of roles in records to those of the chat template."""
    if not spec.roles:
        return ROLES
    return {role: role for role in spec.roles} | {
        name: role for role, names in spec.roles.items() for name in names
    }


def _role(spec: DatasetSpec, name: str, place: Place, *, number: int) -> str:
    known = roles(spec)
    if name in known:
        return known[name]
    if name in ("tool", "function"):
        raise _no_tools(f"message {number} of the role {name}", place)
    raise bad_record(
        place,
        why=f"message {number} has the role {name!r}, needed one of {', '.join(known)}",
        do=f"map it: `roles: {{user: [{name}]}}` in {place.key}",
    )


def _no_tools(found: str, place: Place) -> AttnimgError:
    return bad_record(
        place,
        why=f"found {found}; conversations with tools are not supported",
        do="drop the records with tools",
    )

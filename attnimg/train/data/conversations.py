"""Parse a record into a conversation, with the names that chat templates have for roles and keys.

No part of a message is dropped silently: a key is used, refused, or reported as having no effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from attnimg.config.schema import DatasetSpec, role_names
from attnimg.train.data.message_parts import (
    FLAGS,
    read_content,
    read_flag,
    read_trained_parts,
    split_thinking,
)
from attnimg.train.data.records import (
    Conversation,
    Place,
    Turn,
    bad_record,
    require_column,
    require_text,
    shorten,
)

# Roles of tool calls and of their results in other formats: the names, and the message to write.
TOOL_ROLES = {
    "a tool call of the assistant": (
        {"function_call", "tool_call", "tool_calls", "function-call", "tool-call"},
        'write it as {"role": "assistant", "tool_calls": [{"type": "function", "function": '
        '{"name": ..., "arguments": {...}}}]}',
    ),
    "the result of a tool": (
        {"observation", "function", "function_response", "tool_response", "tool_result",
         "tool_results", "function_result"},
        'write it as {"role": "tool", "content": ...} after the message with tool_calls',
    ),
}  # fmt: skip

# Names of the reasoning before an answer, in the order in which transformers reads them.
# Source: transformers 5.22.2, utils/chat_template_utils.py, _REASONING_FIELDS (2026-11-26)
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

MEDIA = ("image", "images", "video", "videos", "audio", "audios")


def parse_turns(spec: DatasetSpec, record: Mapping[str, Any], place: Place) -> Conversation | None:
    """Return the conversation of a record; None where no trained answer has any text.

    Raises:
        AttnimgError: it is not a list of messages, or a message has content that is not supported.
    """
    name = spec.field_messages or "messages"
    column = require_column(record, name, place, needed=(name,), hint=_column_hint(record, place))
    messages = _parse_json(column)  # some datasets store the conversation as JSON text
    if not isinstance(messages, list) or not messages:
        why = f"{name} is {shorten(column)}, needed a list of messages"
        do = "write a conversation as a list of objects with role and content"
        raise bad_record(place, why=why, do=do)
    _refuse_media(record, "the record", place)
    turns = tuple(
        _turn(spec, message, place, number=n) for n, message in enumerate(messages, start=1)
    )
    system, tools = spec.field_system or "system", spec.field_tools or "tools"
    if not spec.drop_system_message:
        turns = _with_system_column(turns, record, place, column=system)
    elif turns[0].role == "system":
        turns = turns[1:]
    if not turns or not _has_text(spec, turns):
        return None
    used = {name, tools, system}
    unused = tuple(key for key, value in record.items() if key not in used and value is not None)
    return Conversation(turns, read_tools(record.get(tools), place), unused)


def trained_roles(spec: DatasetSpec) -> frozenset[str]:
    """Return the roles whose turns are trained, as the chat template names them."""
    named = spec.roles_to_train if spec.roles_to_train is not None else ["assistant"]
    return frozenset(role_names(spec).get(role, role) for role in named)


def with_function(call: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a tool call with changed keys of its function, which may be the call itself."""
    if "function" in call:
        return {**call, "function": {**call["function"], **changes}}
    return {**call, **changes}


def arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls have their arguments as JSON text.

    The chat templates of DeepSeek concatenate them with other text, and accept only text.
    """
    calls = []
    for call in message.get("tool_calls", ()):
        function = call.get("function", call)
        if "arguments" in function:
            text = json.dumps(function["arguments"], ensure_ascii=False)
            call = with_function(call, arguments=text)
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else dict(message)


def _column_hint(record: Mapping[str, Any], place: Place) -> str:
    """Return advice for the user: the column that has a list of messages, if there is one."""
    if {"prompt", "completion"} <= record.keys():
        return "write prompt and completion as one conversation, in a column messages"
    for name, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            return f"name the column of the conversation: `{place.key}.field_messages: {name}`"
    for name, type_ in (("instruction", "alpaca"), ("text", "completion")):
        if name in record:
            return f"use the type that fits these columns: `{place.key}.type: {type_}`"
    return "write the conversation as a column messages: a list of objects with role and content"


def _keys_hint(spec: DatasetSpec, message: Mapping[str, Any], place: Place) -> str:
    """Return advice for the user: the keys of a message that have a role and a text, if any."""
    texts = {key: value for key, value in message.items() if isinstance(value, str)}
    role = next(
        (key for key, value in texts.items() if value.strip().lower() in role_names(spec)), None
    )
    others = sorted((key for key in texts if key != role), key=lambda key: len(texts[key]))
    if role is None or not others:
        return "add the missing key, or remove the record"
    named = json.dumps({"role": role, "content": others[-1]}, ensure_ascii=False)
    return f"name its keys: `{place.key}.message_property_mappings: {named}`"


def _has_text(spec: DatasetSpec, turns: tuple[Turn, ...]) -> bool:
    """Return whether a conversation has text to train on; without answers, any text counts."""
    trained = trained_roles(spec)
    flagged = [turn.role in trained if turn.train is None else turn.train for turn in turns]
    answers = [turn for turn, flag in zip(turns, flagged, strict=True) if flag] or turns
    return any(
        (turn.content or "").strip()
        or turn.extra.get("tool_calls")
        or turn.extra.get(REASONING_KEYS[0], "").strip()
        for turn in answers
    )


def _with_system_column(
    turns: tuple[Turn, ...], record: Mapping[str, Any], place: Place, *, column: str
) -> tuple[Turn, ...]:
    """Return the turns, preceded by a turn with the system column if set, as in axolotl."""
    if record.get(column) is None:
        return turns
    system = require_text(record[column], column, place)
    if not system.strip() or (turns[0].role == "system" and turns[0].content == system):
        return turns
    if turns[0].role == "system":
        why = f"found a column {column} beside a first message of the role system"
        do = "remove one of the two"
        raise bad_record(place, why=why, do=do)
    return (Turn("system", system), *turns)


def _turn(spec: DatasetSpec, message: object, place: Place, *, number: int) -> Turn:
    """Return one message as a turn, with the key names that chat templates use."""
    mappings = {
        "role": spec.message_field_role or "role",
        "content": spec.message_field_content or "content",
    } | (spec.message_property_mappings or {})
    keys = (mappings["role"], mappings["content"])
    if not isinstance(message, Mapping):
        why = f"message {number} is {shorten(message)}, needed an object with {' and '.join(keys)}"
        raise bad_record(place, why=why, do="write each message as an object")
    named: dict[str, Any] = {
        to: message[name] for to, name in mappings.items() if message.get(name) is not None
    }
    rest = {
        key: value
        for key, value in message.items()
        if key not in mappings.values() and key not in named and value is not None
    }
    named = without_nulls(rest) | named
    if named.get("function_call"):
        raise bad_record(
            place,
            why=f"message {number} has function_call, which chat templates do not read",
            do="write it as tool_calls: a list of "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}',
        )
    _refuse_media(named, f"message {number}", place)
    calls = read_tool_calls(named.get("tool_calls"), place, number=number)
    for key in ("role", "content"):
        if key not in named and not (key == "content" and (calls or mappings[key] in message)):
            found = ", ".join(message) or "nothing"
            why = f"message {number} has {found}; needed {' and '.join(keys)}"
            code = "wrong-columns" if place.first else "bad-data"
            raise bad_record(place, why=why, do=_keys_hint(spec, message, place), code=code)
    name = require_text(named["role"], f"{mappings['role']} of message {number}", place)
    role = _role(spec, name, place, number=number)
    reasoning_keys = dict.fromkeys(
        filter(None, (*REASONING_KEYS, spec.field_thinking, spec.template_thinking_key))
    )
    reasoning = _reasoning(named, place, reasoning_keys, number=number)
    content, untrained = read_content(
        named.get("content"),
        f"{mappings['content']} of message {number}",
        place,
        optional=bool(calls or reasoning),
    )
    flags = tuple(dict.fromkeys(filter(None, (*FLAGS, spec.message_field_training))))
    train = read_flag(named, f"message {number}", place, flags)
    detail, parts = spec.message_field_training_detail, None
    if detail and (written := named.get(detail)) is not None:
        if untrained or content is None:
            why = f"message {number} has {detail}, and its content is not one text"
            raise bad_record(
                place, why=why, do=f"write the content as one text, or remove {detail}"
            )
        parts = read_trained_parts(written, content, f"{detail} of message {number}", place)
        train = parts is not None if train is None else train
    if spec.split_thinking and role == "assistant" and content:
        split, content = split_thinking(content, place, number=number)
        if split and (reasoning or untrained or parts is not None):
            why = f"message {number} has reasoning in tags, and also in a key or with trained parts"
            do = f"write it once, or remove {place.key}.split_thinking"
            raise bad_record(place, why=why, do=do)
        reasoning = reasoning or split
    known = ("role", "content", "tool_calls", "function_call", *reasoning_keys, *flags, *MEDIA)
    extra = {key: value for key, value in named.items() if key not in (*known, detail)}
    if calls:
        extra["tool_calls"] = calls
    if reasoning:
        extra[REASONING_KEYS[0]] = reasoning
    return Turn(role, content, extra, train, untrained, parts)


def _reasoning(
    message: Mapping[str, Any], place: Place, keys: Iterable[str], *, number: int
) -> str:
    """Return the reasoning before an answer, which has different names in different datasets."""
    found = {
        require_text(message[key], f"{key} of message {number}", place): key
        for key in keys
        if message.get(key) not in (None, "")
    }
    if len(found) > 1:
        why = f"message {number} has {' and '.join(found.values())}, which differ"
        do = f"keep one of them, as {REASONING_KEYS[0]}"
        raise bad_record(place, why=why, do=do)
    return next(iter(found), "")


def _refuse_media(value: Mapping[str, Any], what: str, place: Place) -> None:
    for key in MEDIA:
        if value.get(key):
            why = f"{what} has {key}; training on images, audio or video is not supported"
            do = f"remove the record, or remove {key} from it"
            raise bad_record(place, why=why, do=do)


def _role(spec: DatasetSpec, name: str, place: Place, *, number: int) -> str:
    """Return the chat template's name of a role."""
    known = role_names(spec)
    if name in known:
        return known[name]
    what = f"message {number} has the role {name!r}"
    for kind, (names, do) in TOOL_ROLES.items():
        if name in names:
            raise bad_record(place, why=f"{what}, which other formats use for {kind}", do=do)
    standard = known.get(name.strip().lower())
    candidates = (standard,) if standard else ("user", "assistant")
    mapped = (
        {**(spec.roles or {}), role: [*(spec.roles or {}).get(role, []), name]}
        for role in candidates
    )
    raise bad_record(
        place,
        why=f"{what}, needed one of {', '.join(known)}",
        do=f"map it to a standard role, in {place.key}: "
        + " or ".join(f"`roles: {json.dumps(roles, ensure_ascii=False)}`" for roles in mapped),
    )


def without_nulls(value: Any) -> Any:
    """Return a value without null entries, which Arrow adds where other records have a key.

    axolotl removes them too. Source: axolotl 067b021c, utils/dict.py, remove_none_values
    (2026-11-26)
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def read_tools(value: object, place: Place) -> tuple[Mapping[str, Any], ...]:
    """Return the functions that may be called; datasets store them as a list or as JSON text.

    Raises:
        AttnimgError: the value is neither.
    """
    tools = without_nulls(_parse_json(value))
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        why = f"tools is {shorten(value)}, needed a list of objects"
        do = 'write each tool as {"type": "function", "function": {"name": ..., ...}}'
        raise bad_record(place, why=why, do=do)
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and "parameters" in function:
            function["parameters"] = _parse_json(function["parameters"])
    return tuple(tools)


def read_tool_calls(value: object, place: Place, *, number: int) -> list[dict[str, Any]]:
    """Return a message's tool calls, their arguments as objects.

    Raises:
        AttnimgError: a call has no name, or its arguments are not an object.
    """
    calls = without_nulls(_parse_json(value))
    if not calls:
        return []
    fine = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    functions = [call.get("function", call) for call in calls] if fine else []
    for function in functions:
        if isinstance(function, dict) and "arguments" in function:
            function["arguments"] = _parse_json(function["arguments"])
    if not fine or not all(
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments", {}), Mapping)
        for function in functions
    ):
        raise bad_record(
            place,
            why=f"tool_calls of message {number} is {shorten(value)}, needed a list of calls with "
            "name and arguments",
            do='write each call as {"type": "function", "function": {"name": ..., '
            '"arguments": {...}}}',
        )
    return [dict(call) for call in calls]


def _parse_json(value: object) -> Any:
    """Return the value of a JSON text; other values unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value

"""Read the tools and tool calls of a conversation, in the form that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from attnimg.train.data.parsed import shown
from attnimg.train.data.records import Place, bad_record


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
    """Return the functions that may be called; sets store them as a list or as JSON text.

    Raises:
        AttnimgError: it is neither.
    """
    tools = without_nulls(_parsed(value))
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise bad_record(
            place,
            why=f"tools is {shown(value)}, needed a list of objects",
            do='write each tool as {"type": "function", "function": {"name": ..., ...}}',
        )
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, dict) and "parameters" in function:
            function["parameters"] = _parsed(function["parameters"])
    return tuple(tools)


def read_tool_calls(value: object, place: Place, *, number: int) -> list[dict[str, Any]]:
    """Return a message's tool calls, their arguments as objects.

    Raises:
        AttnimgError: a call has no name, or arguments that are no object.
    """
    calls = without_nulls(_parsed(value))
    if not calls:
        return []
    fine = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    functions = [call.get("function", call) for call in calls] if fine else []
    for function in functions:
        if isinstance(function, dict) and "arguments" in function:
            function["arguments"] = _parsed(function["arguments"])
    if not fine or not all(
        isinstance(function, Mapping)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments", {}), Mapping)
        for function in functions
    ):
        raise bad_record(
            place,
            why=f"tool_calls of message {number} is {shown(value)}, needed a list of calls with "
            "name and arguments",
            do='write each call as {"type": "function", "function": {"name": ..., '
            '"arguments": {...}}}',
        )
    return [dict(call) for call in calls]


def arguments_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls hold their arguments as JSON text.

    The chat templates of DeepSeek join them to other text and take nothing else.
    """
    calls = []
    for call in message.get("tool_calls", ()):
        call = dict(call)
        holder = call
        if "function" in call:
            holder = call["function"] = dict(call["function"])
        if "arguments" in holder:
            holder["arguments"] = json.dumps(holder["arguments"], ensure_ascii=False)
        calls.append(call)
    return {**message, "tool_calls": calls} if calls else dict(message)


def _parsed(value: object) -> Any:
    """Return what JSON text holds; other values as they are."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        return value

"""Check that a chat template writes the tools and all of each tool call of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from attnimg.train.data.chat_render import Message, Renderer, Rendering, RewrittenError


def check_tools(renderer: Renderer, rendering: Rendering) -> None:
    """Raise where a template drops the tools, or a part of a tool call.

    Names and keys, then values, are replaced by unique marks. A mark that is not in the rendered
    text was cut off, or belongs to a type of value that the template does not write.

    Raises:
        RewrittenError: the template drops something; the error names the message.
    """
    messages = rendering.messages
    if renderer.tools and replace(renderer, tools=()).attempt(messages) == rendering.text:
        raise RewrittenError(
            "it drops the tools",
            "set chat_template to one that writes tools, or describe them in a system message "
            "and take the column tools out",
        )
    if not any(message.get("tool_calls") for message in messages):
        return
    for marks in (_Marks(values=False), _Marks(values=True)):
        marked = [marks.message(number, message) for number, message in enumerate(messages)]
        text = renderer.attempt(marked) or ""
        for found, number in marks.given.items():
            if found not in text:
                raise RewrittenError(f"it drops a tool call of message {number + 1}, or part of it")
    for number, message in enumerate(messages):
        for other in _with_flipped_flags(message):
            changed = [*messages[:number], other, *messages[number + 1 :]]
            if renderer.attempt(changed) == rendering.text:
                raise RewrittenError(f"it drops a tool call of message {number + 1}, or part of it")


@dataclass(frozen=True, slots=True)
class _Marks:
    """Marks that replace the names and keys of tool calls, or their values.

    Attributes:
        values: whether they replace values.
        given: mark -> the number of its message.
    """

    values: bool
    given: dict[str, int] = field(default_factory=dict)

    def message(self, number: int, message: Message) -> Message:
        """Return a message with marks in its tool calls."""

        def marked(function: Mapping[str, Any]) -> dict[str, Any]:
            name = function["name"] if self.values else self._mark(number, function["name"])
            return {**function, "name": name}

        calls, change = [], partial(self._value, number)
        for call in message.get("tool_calls") or ():
            named = {"function": marked(call["function"])} if "function" in call else marked(call)
            calls.append(_with_arguments({**call, **named}, change))
        return {**message, "tool_calls": calls} if calls else message

    def _mark(self, number: int, old: str) -> str:
        """Return a mark of at least the length of the old text, since a template may cut it off."""
        mark = f"marked_{len(self.given)}_".ljust(len(old), "x")
        self.given[mark] = number
        return mark

    def _value(self, number: int, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key if self.values else self._mark(number, key): self._value(number, inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._value(number, inner) for inner in value]
        if not self.values or value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._mark(number, value)
        mark = 70_000_000 + len(self.given)
        self.given[str(mark)] = number
        return type(value)(mark)


def _with_arguments(call: Message, change: Callable[[Any], Any]) -> dict[str, Any]:
    """Return a tool call with changed arguments, which may be JSON text."""
    function = call.get("function", call)
    if "arguments" not in function:
        return dict(call)
    given = function["arguments"]
    text = isinstance(given, str)
    changed = change(json.loads(given) if text else given)
    arguments = json.dumps(changed, ensure_ascii=False) if text else changed
    if "function" in call:
        return {**call, "function": {**function, "arguments": arguments}}
    return {**call, "arguments": arguments}


def _with_flipped_flags(message: Message) -> Iterator[Message]:
    """Yield a message once for each true, false or null in its calls, with this value negated."""
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        given = call.get("function", call).get("arguments", {})
        for other in _changed(json.loads(given) if isinstance(given, str) else given):
            changed = _with_arguments(call, partial(_first, other))
            yield {**message, "tool_calls": [*calls[:number], changed, *calls[number + 1 :]]}


def _first(first: Any, _: Any) -> Any:
    return first


def _changed(value: Any) -> Iterator[Any]:
    """Yield a value once for each true, false or null in it, with this one negated."""
    if value is None or isinstance(value, bool):
        yield not value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in _changed(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            for other in _changed(inner):
                yield [*value[:index], other, *value[index + 1 :]]

"""Find the characters of a rendered conversation to train: answers, and the ends of turns.

Conversations of plain messages with the same roles share one layout. A template that drops a part
of a tool call is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnimg.train.data.chat_render import (
    Literals,
    Message,
    Renderer,
    Rendering,
    RewrittenError,
    TemplateError,
    literals_between,
    place_contents,
    placeholder,
    render,
)
from attnimg.train.data.chat_turn import EndTokens, RenderedTurn
from attnimg.train.data.conversations import with_function
from attnimg.train.data.records import Span

NO_END = (
    "the chat template writes nothing after an answer, so the model does not learn to stop; "
    "set chat_template to one that ends each turn with a token"
)

UNMARKED_END = (
    "the chat template ends its {% generation %} block before the token that ends an answer, so "
    "the model does not learn to stop; move {% endgeneration %} after that token"
)

PARTLY_MARKED = (
    "the chat template has a part of an answer outside of its {% generation %} block; this part is "
    "not trained"
)

APPENDED = (
    "the chat template ends a turn only by the start of the next one, {!r}; this text is added "
    "after the last answer, so that the model learns to stop"
)

NOT_CONFIGURED = (
    "eot_tokens ({}) do not end the answers of the chat template; they end with {!r}, which is "
    "trained instead"
)

NOT_ONE_TOKEN = (
    "the chat template ends a turn with {0!r}, which is not a single token of the tokenizer; "
    "generation can only stop at a single token: add it with `tokens: [{0!r}]`"
)

RESTORED = (
    "the chat template drops the reasoning of every answer; it is restored before the last answer, "
    "where the model generates it"
)


@dataclass(frozen=True, slots=True)
class AnswerSpans:
    """The spans of a trained turn.

    Attributes:
        turn: its number, from 0.
        text: the spans of its text.
        end: the spans of the text that ends the turn; empty where there is none.
    """

    turn: int
    text: tuple[Span, ...]
    end: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class AnswerLayout:
    """A rendered conversation with its answers.

    Attributes:
        rendering: the rendered conversation.
        answers: the spans of the trained turns.
        appended: text to append, if the template ends a turn only by the start of the next one.
        warnings: for the user.
    """

    rendering: Rendering
    answers: tuple[AnswerSpans, ...]
    appended: str
    warnings: tuple[str, ...]


def build_layout(
    renderer: Renderer, rendering: Rendering, trained: Sequence[bool], ends: EndTokens
) -> AnswerLayout:
    """Find the answers of a rendered conversation.

    Args:
        renderer: the template.
        rendering: the conversation, with the positions of its contents.
        trained: whether each turn is trained.
        ends: the tokens that may end a turn.

    Raises:
        RewrittenError: the template drops part of a turn, or does not show where it ends.
    """
    _check_tools(renderer, rendering)
    generated = renderer.generation_spans(rendering.messages)
    warnings, bounds, stops = dict[str, None](), dict[int, Span](), dict[int, int]()
    if renderer.restores_reasoning:
        warnings[RESTORED] = None
    for number, message in enumerate(rendering.messages):
        turn = RenderedTurn(renderer, rendering, number)
        # To assign each generated span to an answer, the bounds of all answers must be known.
        if trained[number] or (generated and message["role"] == "assistant"):
            start, text_end = turn.bounds(warnings)
            if start < text_end:
                bounds[number] = start, text_end
                if generated:
                    stops[number] = turn.end(text_end, ends) or text_end
        else:
            turn.reasoning(warnings)  # refused where it is dropped, trained or not
    answers, appended = list[AnswerSpans](), ""
    speakers = [n for n, message in enumerate(rendering.messages) if message["role"] == "assistant"]
    # A generated span belongs to the first answer that ends after the span's start; the end of an
    # answer may have a span of its own. Spans after all answers belong to the last turn, since
    # Phi-3's template ends the conversation there.
    last = max([*bounds, *speakers], default=0)
    owners = [
        next((n for n, (_, end) in bounds.items() if a <= end or a < stops[n]), last)
        for a, _ in generated
    ]
    for number, (start, text_end) in bounds.items():
        if not trained[number]:
            continue
        turn = RenderedTurn(renderer, rendering, number)
        # Spans before the turn's text, or after the next content, belong to an answer without text.
        spans = [
            (a, min(b, turn.limit))
            for (a, b), owner in zip(generated, owners, strict=True)
            if owner == number and b > start and a < turn.limit
        ]
        if not spans:
            end = turn.end(text_end, ends)
            if end is None and number == len(rendering.messages) - 1:
                appended = turn.next_opening(text_end, ends)
                end = len(rendering.text) + len(appended) if appended else None
                if appended:
                    warnings[APPENDED.format(appended.strip())] = None
            spans = [(start, end or text_end)]
        reached = start
        for a, b in (*sorted(spans), (text_end, text_end)):
            if rendering.text[reached : max(reached, min(a, text_end))].strip():
                warnings[PARTLY_MARKED] = None
            reached = max(reached, b)
        end = max(b for _, b in spans)
        ending = (rendering.text + appended)[text_end:end]
        if not ending.strip():
            warnings[UNMARKED_END if generated else NO_END] = None
        elif not ends.pattern.search(ending):
            warnings[NOT_ONE_TOKEN.format(ending.strip())] = None
        elif ends.configured and not any(token in ending for token in ends.configured):
            warnings[NOT_CONFIGURED.format(", ".join(ends.configured), ending.strip())] = None
        answers.append(
            AnswerSpans(
                number,
                tuple((a, min(b, text_end)) for a, b in spans if a < text_end),
                tuple((max(a, text_end), b) for a, b in spans if b > text_end),
            )
        )
    return AnswerLayout(rendering, tuple(answers), appended, tuple(warnings))


@dataclass(frozen=True, slots=True)
class SharedLayout:
    """The template's text and the layout that all conversations with the same roles share.

    Attributes:
        literals: the template's own text between the contents.
        layout: the layout of the conversation with placeholders in place of contents.
    """

    literals: Literals
    layout: AnswerLayout

    def fit(self, messages: tuple[Message, ...], text: str) -> AnswerLayout | None:
        """Return the layout with the contents of these messages; None where it does not fit.

        Answers begin and end in the template's text, never inside a content.
        """
        rendering = Rendering(messages, text)
        placed = place_contents(rendering, self.literals, include_think=True)
        if placed is None:
            return None
        rendering = replace(rendering, contents=placed)
        old_starts, new_starts = (self._starts(r) for r in (self.layout.rendering, rendering))
        *pieces, last = self.literals[1]
        pieces.append(last + self.layout.appended)

        def shift(at: int) -> int:
            return next(
                new + at - old
                for old, new, piece in zip(old_starts, new_starts, pieces, strict=True)
                if old <= at <= old + len(piece)
            )

        answers = tuple(
            AnswerSpans(
                answer.turn,
                tuple((shift(a), shift(b)) for a, b in answer.text),
                tuple((shift(a), shift(b)) for a, b in answer.end),
            )
            for answer in self.layout.answers
        )
        return replace(self.layout, rendering=rendering, answers=answers)

    def _starts(self, rendering: Rendering) -> tuple[int, ...]:
        """Return where each literal starts: after the content before it."""
        spans = (rendering.contents[number] for number in self.literals[0])
        return (0, *(span[1] for span in spans if span))


def build_shared_layout(
    renderer: Renderer, roles: Sequence[str], bounded: Sequence[bool], ends: EndTokens
) -> SharedLayout | None:
    """Return the layout of a conversation with placeholders as contents; None where that fails.

    It fails where the answers can't be found, or where the template marks a part of a content as
    generated. Each conversation is then laid out separately, and an error names its record.
    """
    replaced = tuple(
        {"role": role, "content": placeholder(index)} for index, role in enumerate(roles)
    )
    try:
        rendering = render(renderer, replaced)
        layout = build_layout(renderer, rendering, bounded, ends)
    except (TemplateError, RewrittenError):
        return None
    bounds = [at for answer in layout.answers for span in answer.text for at in span]
    if any(a < at < b for at in bounds for a, b in filter(None, rendering.contents)):
        return None
    literals = literals_between(rendering.text, [True] * len(roles))
    assert literals is not None, roles
    return SharedLayout(literals, layout)


def _check_tools(renderer: Renderer, rendering: Rendering) -> None:
    """Raise RewrittenError where a template drops the tools, or a part of a tool call.

    Names and keys, then values, are replaced by placeholders. One that is not in the rendered
    text was cut off, or belongs to a type of value that the template does not write. A boolean
    can't be replaced by one: each is negated, which must change the text.
    """
    messages = rendering.messages
    if renderer.tools and replace(renderer, tools=()).try_text(messages) == rendering.text:
        raise RewrittenError(
            "it drops the tools",
            "set chat_template to one that writes tools, or describe them in a system message "
            "and remove the column tools",
        )
    if not any(message.get("tool_calls") for message in messages):
        return
    dropped = set[int]()
    for placeholders in (_Placeholders(values=False), _Placeholders(values=True)):
        replaced = [
            placeholders.message(number, message) for number, message in enumerate(messages)
        ]
        text = renderer.try_text(replaced) or ""
        dropped |= {number for found, number in placeholders.used.items() if found not in text}
    for number, message in enumerate(messages):
        for other in () if dropped else _with_negated_flags(message):
            changed = [*messages[:number], other, *messages[number + 1 :]]
            if renderer.try_text(changed) == rendering.text:
                dropped.add(number)
    if dropped:
        raise RewrittenError(f"it drops a tool call of message {min(dropped) + 1}, or part of it")


@dataclass(frozen=True, slots=True)
class _Placeholders:
    """Unique texts that replace the names and keys of tool calls, or their values.

    Attributes:
        values: whether they replace values.
        used: placeholder -> the index of its message.
    """

    values: bool
    used: dict[str, int] = field(default_factory=dict)

    def message(self, number: int, message: Message) -> Message:
        """Return a message with placeholders in its tool calls."""
        calls = []
        for call in message.get("tool_calls") or ():
            if not self.values:
                name = call.get("function", call)["name"]
                call = with_function(call, name=self._placeholder(number, name))
            calls.append(_with_arguments(call, self._value(number, _arguments(call))))
        return {**message, "tool_calls": calls} if calls else message

    def _placeholder(self, number: int, old: str) -> str:
        """Return a placeholder at least as long as the old text, which a template may cut off."""
        text = f"marked_{len(self.used)}_".ljust(len(old), "x")
        self.used[text] = number
        return text

    def _value(self, number: int, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {
                key if self.values else self._placeholder(number, key): self._value(number, inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [self._value(number, inner) for inner in value]
        if not self.values or value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._placeholder(number, value)
        number_placeholder = 70_000_000 + len(self.used)
        self.used[str(number_placeholder)] = number
        return type(value)(number_placeholder)


def _arguments(call: Message) -> Any:
    """Return the arguments of a tool call, which may be JSON text."""
    given = call.get("function", call).get("arguments", {})
    return json.loads(given) if isinstance(given, str) else given


def _with_arguments(call: Message, arguments: Any) -> Message:
    """Return a tool call with other arguments, in the same form (object or JSON text)."""
    function = call.get("function", call)
    if "arguments" not in function:
        return call
    if isinstance(function["arguments"], str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return with_function(call, arguments=arguments)


def _with_negated_flags(message: Message) -> Iterator[Message]:
    """Yield a message once for each true, false or null in its calls, with this value negated."""
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        for other in _negated(_arguments(call)):
            changed = _with_arguments(call, other)
            yield {**message, "tool_calls": [*calls[:number], changed, *calls[number + 1 :]]}


def _negated(value: Any) -> Iterator[Any]:
    """Yield a value once for each true, false or null in it, with this one negated."""
    if value is None or isinstance(value, bool):
        yield not value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from ({**value, key: other} for other in _negated(inner))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from ([*value[:index], x, *value[index + 1 :]] for x in _negated(inner))

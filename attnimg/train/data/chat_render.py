"""Render conversations with a chat template, and locate the record's text in the result.

A content is located by rendering the conversation with a unique placeholder instead of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnimg.train.data.chat_templates import render_bounded
from attnimg.train.data.conversations import arguments_as_text
from attnimg.train.data.records import Conversation, Span, Turn

Message = Mapping[str, Any]
Literals = tuple[tuple[int, ...], tuple[str, ...]]  # message indices, and the texts around them

THINK_END = "</think>"
LIST_AS_TEXT = re.compile(r"""['"]type['"]: ?['"]text['"]""")  # a list of parts written as text
# Templates mark the text that the model generates with {% generation %}.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(Exception):
    """Raised where a chat template raises, with its message."""


@dataclass(frozen=True, slots=True)
class Renderer:
    """A chat template with its tokenizer.

    Attributes:
        tokenizer: a transformers tokenizer, whose special tokens the template may write.
        template: the template in Jinja.
        tools: JSON schemas, passed to the template.
        thinking_key: what the template calls the reasoning of a message.
        options: other variables of the template.
        parts: whether contents are passed as lists of one part, as to vision models.
        restores_reasoning: whether reasoning that the template drops is restored before the last
            answer, where the model generates it.
    """

    tokenizer: Any
    template: str
    tools: tuple[Message, ...] = ()
    thinking_key: str = "reasoning_content"
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: bool = False
    restores_reasoning: bool = False

    def text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Return the rendered text; with `prompt`, it ends with the opening of an answer.

        Raises:
            TemplateError: the template raised.
        """
        text = self._render(messages, add_generation_prompt=prompt)[0]
        return (
            self._restore_reasoning(messages, text)
            if self.restores_reasoning and not prompt
            else text
        )

    def try_text(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """Return the rendered text; None where the template raises, as it may on a part."""
        try:
            return self.text(messages, prompt=prompt) if messages else None
        except TemplateError:
            return None

    @property
    def has_generation_blocks(self) -> bool:
        """Return whether the template marks the text that the model generates."""
        return GENERATION.search(self.template) is not None

    def generation_spans(self, messages: Sequence[Message]) -> list[Span]:
        """Return the spans of the template's {% generation %} blocks; empty without them."""
        if not self.has_generation_blocks:
            return []
        return self._render(messages, return_assistant_tokens_mask=True)[1]

    def _restore_reasoning(self, messages: Sequence[Message], text: str) -> str:
        """Return a text with the full content of the last answer, including its reasoning."""
        last, think = messages[-1], think_block(messages[-1])
        if not think:
            return text
        shown = self._render([*messages[:-1], {**last, "content": placeholder(-1)}])[0]
        before, found, after = shown.partition(placeholder(-1))
        answer = text[len(before) : len(text) - len(after)].strip()
        dropped = found and text.startswith(before) and text.endswith(after)
        if not dropped or answer != last["content"][len(think) :].strip():
            return text
        if before.rstrip().endswith(THINK_END):  # the template wrote its own reasoning
            return text
        opening = "" if "<think>" in think else "<think>\n"  # generation begins with it
        return before + opening + str(last["content"]) + after

    def _format_message(self, message: Message) -> dict[str, Any]:
        if "reasoning_content" in message:
            message = {
                self.thinking_key if key == "reasoning_content" else key: value
                for key, value in message.items()
            }
        content = message.get("content")
        if self.parts and content:
            return {**message, "content": [{"type": "text", "text": content}]}
        return dict(message)

    def _render(self, messages: Sequence[Message], **kwargs: Any) -> tuple[str, list[Span]]:
        import jinja2

        try:
            text, spans = render_bounded(
                [self._format_message(message) for message in messages],
                template=self.template,
                tools=[dict(tool) for tool in self.tools] or None,
                **kwargs,
                **self.options,
                **self.tokenizer.special_tokens_map,
            )
            text.encode()  # raises for a lone surrogate, as tokenizers do
        except (
            jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError,
            TypeError, ValueError,
        ) as error:  # fmt: skip
            raise TemplateError(str(error) or type(error).__name__) from None
        if self.parts and LIST_AS_TEXT.search(text):
            raise TemplateError("it writes a list of content parts as a list, not as text")
        return text, spans


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as rendered by a template.

    Attributes:
        messages: the messages that the template got.
        text: the rendered text.
        contents: the span of each message's content in the text; None for a blank one.
    """

    messages: tuple[Message, ...]
    text: str
    contents: tuple[Span | None, ...] = ()


class RewrittenError(Exception):
    """Raised where a template does not write a record's text unchanged."""

    def __init__(
        self,
        how: str,
        do: str = "change the record, or set chat_template to one that writes all of it, in order",
    ) -> None:
        super().__init__(how)
        self.do = do


def render(renderer: Renderer, messages: tuple[Message, ...]) -> Rendering:
    """Render messages and locate their contents.

    Raises:
        TemplateError: the template raised.
        RewrittenError: it drops, repeats, reorders or rewrites the text of a message.
    """
    rendering = Rendering(messages, renderer.text(messages))
    return replace(rendering, contents=_locate(renderer, rendering))


def message_forms(
    renderer: Renderer, conversation: Conversation
) -> Iterator[tuple[Renderer, tuple[Message, ...]]]:
    """Yield the messages in each form that templates expect; nearly all take the first.

    Beside tool calls, a content may be missing (as in axolotl), empty (most templates) or null
    (DeepSeek-R1's), and the arguments may be JSON text (DeepSeek's). Reasoning may have a key of
    its own, or be in the content of the last answer only (DeepSeek's templates drop it there too).
    Templates of vision models may accept only lists of parts.
    """
    known = [_message(renderer, turn) for turn in conversation.turns]
    absent = [turn.content is None for turn in conversation.turns]
    without: tuple[dict[str, Any], ...] = ({}, {"content": ""}, {"content": None})
    seen = list[tuple[Message, ...]]()
    for reasoning in (dict, _move_reasoning_to_key):
        for arguments in (dict, arguments_as_text):
            for content in without:
                form = tuple(
                    arguments(reasoning(message | content if missing else message))
                    for message, missing in zip(known, absent, strict=True)
                )
                if form not in seen:
                    seen.append(form)
                    yield renderer, form
    joined = tuple(map(_with_think_tags, seen[0]))
    if (
        THINK_END in renderer.template
        and not renderer.has_generation_blocks
        and _drops_reasoning(renderer, joined)
    ):
        yield replace(renderer, restores_reasoning=True), joined
    yield replace(renderer, parts=True), seen[0]


def _message(renderer: Renderer, turn: Turn) -> dict[str, Any]:
    """Return a turn as a message, with the keys that the template reads.

    The standard keys are always included, since a template may read them without naming them.
    """
    standard = ("reasoning_content", "tool_calls", "name", "tool_call_id")
    extra = {
        k: v for k, v in turn.extra.items() if k in standard or template_reads(renderer.template, k)
    }
    content = {} if turn.content is None else {"content": turn.content}
    return {"role": turn.role, **content, **extra}


def template_reads(template: str, key: str) -> bool:
    """Return whether a template reads a key of a message, or of anything else."""
    return re.search(rf"""[.'"]{re.escape(key)}\b""", template) is not None


def find_reasoning(message: Message) -> str:
    """Return the reasoning of an answer, from its key or from <think> tags in its content."""
    if message.get("reasoning_content"):
        return str(message["reasoning_content"]).strip()
    before, tag, _ = think_block(message).rpartition(THINK_END)
    return before.strip().removeprefix("<think>").strip() if tag else ""


def with_reasoning(message: Message, other: str) -> Message:
    """Return an answer with other reasoning text, in reasoning_content or in <think> tags."""
    reasoning, think = find_reasoning(message), think_block(message)
    if message.get("reasoning_content"):
        return {**message, "reasoning_content": other}
    end = len(think.rpartition(THINK_END)[0].rstrip())
    content = str(message["content"])
    return {**message, "content": content[: end - len(reasoning)] + other + content[end:]}


def think_block(message: Message) -> str:
    """Return the part of a content before the answer: its reasoning in <think> tags."""
    content = message.get("content") or ""
    _, tag, answer = content.rpartition(THINK_END)
    if message["role"] != "assistant" or not tag or not answer.strip():
        return ""
    return str(content[: len(content) - len(answer.lstrip())])


def _move_reasoning_to_key(message: Message) -> Message:
    """Return a message with the reasoning of its content under a key of its own."""
    think, reasoning = think_block(message), find_reasoning(message)
    if message.get("reasoning_content") or not reasoning:
        return message
    return {**message, "content": message["content"][len(think) :], "reasoning_content": reasoning}


def _drops_reasoning(renderer: Renderer, messages: Sequence[Message]) -> bool:
    """Return whether a template drops reasoning in the content of the last answer."""
    number = next((n for n, message in enumerate(messages) if think_block(message)), None)
    if number is None:
        return False
    replaced = with_reasoning(messages[number], placeholder(number))
    return placeholder(number) not in (renderer.try_text([*messages[:number], replaced]) or "")


def _with_think_tags(message: Message) -> Message:
    """Return a message with its reasoning in <think> tags in its content."""
    content = message.get("content")
    if message["role"] != "assistant" or not message.get("reasoning_content") or not content:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    tagged = f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{content}"
    return {**rest, "content": tagged}


def placeholder(number: int) -> str:
    """Return a content that no other text contains, for a message of this number."""
    return f"(content {number} of a turn)"


def _locate(renderer: Renderer, rendering: Rendering) -> tuple[Span | None, ...]:
    """Find the content of each message, with placeholders for all contents or for one at a time."""
    messages = rendering.messages
    replaced = tuple(
        {**message, "content": think_block(message) + placeholder(number)}
        if _has_content(message)
        else message
        for number, message in enumerate(messages)
    )
    text = renderer.try_text(replaced)
    if text is not None:
        literals = literals_between(text, [_has_content(message) for message in messages])
        found = place_contents(rendering, literals)
        if found:
            return found
    spans = list[Span | None]()
    for number, message in enumerate(messages):
        one = (*messages[:number], replaced[number], *messages[number + 1 :])
        spans.append(
            _find_content(renderer.try_text(one), rendering, number)
            if _has_content(message)
            else None
        )
    if not _in_order(messages, spans):
        raise RewrittenError("it reorders turns")
    return tuple(spans)


def _has_content(message: Message) -> bool:
    return bool((message.get("content") or "").strip())


def literals_between(text: str, has_content: Sequence[bool]) -> Literals | None:
    """Return the template's own text around placeholders, and their order in it.

    None where the template drops or repeats one of them.
    """
    numbers = [number for number, present in enumerate(has_content) if present]
    if any(text.count(placeholder(number)) != 1 for number in numbers):
        return None
    numbers.sort(key=lambda number: text.index(placeholder(number)))
    pieces = list[str]()
    for number in numbers:
        piece, _, text = text.partition(placeholder(number))
        pieces.append(piece)
    return tuple(numbers), (*pieces, text)


def place_contents(
    rendering: Rendering, literals: Literals | None, *, include_think: bool = False
) -> tuple[Span | None, ...] | None:
    """Find contents in a text that must be the literals with the contents between them.

    With `include_think`, the reasoning in a content belongs to it, not to the literal before it.
    """
    if literals is None:
        return None
    numbers, pieces = literals
    text, spans = rendering.text, list[Span | None]([None] * len(rendering.messages))
    if not text.startswith(pieces[0]):
        return None
    at = len(pieces[0])
    for number, after in zip(numbers, pieces[1:], strict=True):
        message = rendering.messages[number]
        for content in _content_forms(message, include_think=include_think):
            if text.startswith(content + after, at):
                break
        else:
            return None
        end = at + len(content)
        spans[number] = (at if include_think else _with_think_block(message, text, at), end)
        at = end + len(after)
    return tuple(spans) if at == len(text) and _in_order(rendering.messages, spans) else None


def _content_forms(message: Message, *, include_think: bool) -> tuple[str, ...]:
    """Return the forms in which templates write a content: as it is, stripped, as JSON.

    Qwen's templates strip newlines only.
    """
    content = message["content"][0 if include_think else len(think_block(message)) :]
    plain = dict.fromkeys(
        cut
        for blanks in (None, "\n")
        for cut in (content, content.strip(blanks), content.lstrip(blanks), content.rstrip(blanks))
    )
    if message["role"] == "assistant":
        return tuple(plain)
    return (*plain, json.dumps(content, ensure_ascii=False)[1:-1])


def _with_think_block(message: Message, text: str, start: int) -> int:
    """Return where a content starts, including its <think> block where the text has it too."""
    think = think_block(message)
    for variant in (think, think.lstrip()):
        if variant and text.endswith(variant, 0, start):
            return start - len(variant)
    return start


def _find_content(text: str | None, rendering: Rendering, number: int) -> Span:
    """Return the span of one content, found by a rendering with a placeholder in its place."""
    if text is None or text.count(placeholder(number)) != 1:
        raise RewrittenError(f"it drops or repeats the content of message {number + 1}")
    before, _, after = text.partition(placeholder(number))
    rendered, end = rendering.text, len(rendering.text) - len(after)
    if not (rendered.startswith(before) and rendered.endswith(after) and end >= len(before)):
        raise RewrittenError(f"its text around message {number + 1} depends on the content")
    message = rendering.messages[number]
    if rendered[len(before) : end] not in _content_forms(message, include_think=False):
        raise RewrittenError(f"it rewrites the content of message {number + 1}")
    return _with_think_block(message, rendered, len(before)), end


def _in_order(messages: Sequence[Message], spans: Sequence[Span | None]) -> bool:
    """Return whether the turns are in their order; system messages may be moved.

    Gemma's template moves them into the first user turn, Mistral's into the last one.
    """
    starts = [
        span[0]
        for message, span in zip(messages, spans, strict=True)
        if span is not None and message["role"] not in ("system", "developer")
    ]
    return starts == sorted(starts)

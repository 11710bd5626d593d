"""Find where one turn of a rendered conversation begins and ends.

An answer begins where the template's generation prompt ends, and ends with the token that ends its
turn. Both are found by comparing renderings: of the conversation, of its beginning, and with
another answer in the same place. Nothing is guessed from names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnimg.train.data.chat_render import (
    THINK_END,
    Message,
    Renderer,
    Rendering,
    RewrittenError,
    find_reasoning,
    placeholder,
    think_block,
    with_reasoning,
)
from attnimg.train.data.records import Span

# Text that may open the reasoning, where the template has no generation prompt.
OPENING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]\s*\Z", re.IGNORECASE)
TAG = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_/]{1,40}\]")
# Two plain answers with different first and last characters.
PLAIN = ("1 plain answer 2", "3 plain answer 4")

UNPROMPTED_START = (
    "the chat template starts answers with {!r}, but the generation prompt does not; this text is "
    "not from the record, and is not trained"
)
CHANGED_PROMPT = (
    "the chat template writes earlier turns differently when later turns follow (it removes "
    "reasoning, or moves the system message or the tools): all answers except the last are trained "
    "with a prompt that differs from the one at generation"
)
REASONING_REMOVED = (
    "the chat template removes the reasoning of earlier turns, so only that of the last turn is "
    "trained"
)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that may end a turn.

    Attributes:
        pattern: matches one of the tokens.
        eos: the tokenizer's end-of-text token.
        configured: the eot_tokens of the config.
    """

    pattern: re.Pattern[str]
    eos: str | None
    configured: tuple[str, ...]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, configured: tuple[str, ...]) -> EndTokens:
        """Return the tokenizer's special and added tokens, without those that open a text."""
        tokens = {*tokenizer.all_special_tokens, *configured}
        tokens |= set(map(str, tokenizer.added_tokens_decoder.values()))
        if tokenizer.bos_token != tokenizer.eos_token:
            tokens.discard(tokenizer.bos_token)
        named = [re.escape(t) for t in tokens if t and not t.isspace() and not t.isalnum()]
        pattern = "|".join(sorted(named, key=len, reverse=True)) or r"(?!)"
        return cls(re.compile(pattern), tokenizer.eos_token, configured)

    def first(self, text: str, start: int, limit: int) -> int | None:
        """Return the end of the end token at `start`; only blanks may come before it."""
        found = self.pattern.search(text, start, limit)
        if found is None or text[start : found.start()].strip():
            return None
        return found.end()


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One turn of a rendered conversation, with methods that find its position."""

    renderer: Renderer
    rendering: Rendering
    number: int

    @property
    def message(self) -> Message:
        """Return the turn's message as passed to the template."""
        return self.rendering.messages[self.number]

    @property
    def before(self) -> int:
        """Return the end of the last content before this turn's (system messages may be moved)."""
        own = self.rendering.contents[self.number]
        start = own[0] if own else len(self.rendering.text)
        earlier = self.rendering.contents[: self.number]
        return max((span[1] for span in earlier if span and span[1] <= start), default=0)

    @property
    def limit(self) -> int:
        """Return the start of the first content after this turn's."""
        own = self.rendering.contents[self.number]
        after = own[1] if own else self.before
        starts = [span[0] for span in self.rendering.contents if span and span != own]
        return min((start for start in starts if start >= after), default=len(self.rendering.text))

    def bounds(self, warnings: dict[str, None]) -> Span:
        """Return where the turn's text begins and ends; equal where it has no text."""
        text, content = self.rendering.text, self.rendering.contents[self.number]
        reasoning = self.reasoning(warnings)
        if content is None and reasoning is None and not self.message.get("tool_calls"):
            return 0, 0
        first, end = content or (0, 0)
        if content is None or self.message.get("tool_calls"):
            low, end = self._bounds_of_calls()
            low = end - len(text[low:end].lstrip())
            first = min(first, low) if content else low
        if self.message["role"] != "assistant":
            return first, end
        prompt = self._prompt(warnings)
        if prompt is None or not text.startswith(prompt) or len(prompt) > first:
            prompt = None
        if reasoning is None:
            if prompt and self.message.get("tool_calls") and not self._plain_opens(prompt, first):
                return len(prompt), end
            unprompted = text[len(prompt) : first].strip() if prompt else ""
            if unprompted and not self.renderer.has_generation_blocks:
                warnings[UNPROMPTED_START.format(unprompted)] = None
            return first, end
        # The text that opens the reasoning belongs to it, unless the generation prompt has it.
        first = reasoning - (len(text[len(prompt) : reasoning].lstrip()) if prompt else 0)
        opening = OPENING.search(text, self.before, reasoning)
        return min(first, opening.start() if opening else first), end

    def reasoning(self, warnings: dict[str, None]) -> int | None:
        """Return where the turn's reasoning begins; None where there is none."""
        reasoning = find_reasoning(self.message)
        content = self.rendering.contents[self.number]
        within = content and THINK_END in self.rendering.text[slice(*content)]
        if not reasoning or (within and not self.message.get("reasoning_content")):
            return None
        # A placeholder, since a short reasoning may also be in the template's own text.
        text, shown = self.rendering.text, self._with_placeholder_reasoning()
        before, found, after = shown.partition(placeholder(self.number))
        if found:
            at = len(text) - len(text[len(before) :].lstrip())
            unchanged = text.startswith(before) and text.startswith(reasoning, at)
            ordered = self.before <= at <= (content[0] if content else self.limit)
            if unchanged and ordered and placeholder(self.number) not in after:
                return at
            raise RewrittenError(
                f"it rewrites or repeats the reasoning of message {self.number + 1}"
            )
        last = self.number == len(self.rendering.messages) - 1
        if last or placeholder(self.number) not in self._with_placeholder_reasoning(last=True):
            tags = ", or put the reasoning into the content as <think>...</think>"
            raise RewrittenError(
                f"it drops the reasoning of message {self.number + 1}",
                "set chat_template to one that writes reasoning"
                + ("" if THINK_END in self.renderer.template else tags),
            )
        warnings[REASONING_REMOVED] = None
        return None

    def _with_placeholder_reasoning(self, *, last: bool = False) -> str:
        """Return the text with a placeholder as reasoning; with `last`, without later turns."""
        messages = list(self.rendering.messages)
        messages[self.number] = with_reasoning(self.message, placeholder(self.number))
        return self.renderer.try_text(messages[: self.number + 1] if last else messages) or ""

    def _prompt(self, warnings: dict[str, None]) -> str | None:
        """Return the generation prompt of this answer, if the conversation has the same text there.

        None where it differs, or where the template writes no generation prompt.
        """
        messages = self.rendering.messages
        prompt = self.renderer.try_text(messages[: self.number], prompt=True)
        if prompt is None or _common_prefix(prompt, self.rendering.text) >= self.before:
            return prompt if prompt != self.renderer.try_text(messages[: self.number]) else None
        may_move = self.renderer.tools or any(
            message["role"] in ("system", "developer", "tool")
            or message.get("reasoning_content")
            or message.get("tool_calls")
            for message in messages
        )
        if not may_move:
            raise RewrittenError("the text that it writes before a turn depends on later turns")
        warnings[CHANGED_PROMPT] = None
        return None

    def _bounds_of_calls(self) -> Span:
        """Return where a turn with tool calls, or with reasoning alone, begins and ends.

        Rendering a plain answer in its place shows the template's own text around it. The messages
        after it may not fit a plain answer (the result of a tool), or their text may change with
        it: so the turn must have the same text as when it is the last one. Where no plain answer
        fits, the turn is found by that text.
        """
        text, messages = self.rendering.text, self.rendering.messages
        alone = self.renderer.try_text(messages[: self.number + 1]) or ""
        turn_text = alone[slice(*self._span_unlike_plain(alone, messages[: self.number + 1]))]
        low, high = self._span_unlike_plain(text, messages)
        if self.before <= low < high <= self.limit and turn_text.endswith(text[low:high]):
            return low, high
        tags = list(TAG.finditer(turn_text))
        if (
            tags
            and alone.rstrip().endswith(turn_text.rstrip())
            and turn_text.endswith(tags[-1].group())
        ):
            turn_text = turn_text[
                : tags[-1].start()
            ]  # Gemma 4 ends a call differently from a plain answer
        if turn_text and text.count(turn_text, self.before, self.limit) == 1:
            low = text.index(turn_text, self.before)
            return low, low + len(turn_text)
        raise RewrittenError(f"the end of message {self.number + 1} cannot be found")

    def _span_unlike_plain(self, rendered: str, messages: Sequence[Message]) -> Span:
        """Return where a rendering differs from the one with a plain answer here."""
        prefixes, suffixes = [], []
        for content in PLAIN:
            plain = {"role": self.message["role"], "content": content}
            other = self.renderer.try_text(
                [*messages[: self.number], plain, *messages[self.number + 1 :]]
            )
            prefixes.append(_common_prefix(rendered, other or ""))
            suffixes.append(_common_prefix(rendered[::-1], (other or "")[::-1]))
        return (
            _before_tag(rendered, min(prefixes)),
            _before_tag(rendered, len(rendered) - min(suffixes)),
        )

    def _plain_opens(self, prompt: str, first: int) -> bool:
        """Return whether the text before this turn's text is also before a plain answer.

        Otherwise it belongs to a call: gpt-oss names the channel, Muse Glimmer the called tool.
        """
        plain = {"role": self.message["role"], "content": PLAIN[0]}
        rendered = self.renderer.try_text([*self.rendering.messages[: self.number], plain]) or ""
        opening = rendered.partition(PLAIN[0])[0][len(prompt) :]
        return opening.strip() == self.rendering.text[len(prompt) : first].strip()

    def end(self, text_end: int, ends: EndTokens) -> int | None:
        """Return the end of the text that ends the turn; None where there is none.

        Text that is written both at the end of the conversation and before another turn belongs to
        the turn.
        """
        text, messages = self.rendering.text, self.rendering.messages
        ended, continued = text[text_end:], text[text_end : self.limit]
        if self.number + 1 < len(messages):
            ended = self._text_after(messages[: self.number + 1], text_end)
        else:
            continued = self._text_after(self._with_turn("user"), text_end) or ended
        shared = _before_tag(ended, _common_prefix(ended, continued))
        if not ended[:shared].strip():
            # The end depends on what follows (gpt-oss), or opens the next turn (GLM-4.5).
            return ends.first(text, text_end, self.limit)
        tokens = list(ends.pattern.finditer(ended[:shared]))
        named = [token for token in tokens if token.group() in (ends.configured or (ends.eos,))]
        # If a template always ends with the opening of an answer, that text is not part of the end.
        rest = ended[tokens[-1].start() :] if tokens else ""
        if (
            not named
            and len(tokens) > 1
            and ended[shared:].strip()
            and rest.strip() in text[:text_end]
        ):
            tokens.pop()
        last = (named or tokens)[-1:]
        return text_end + (last[0].end() if last else len(ended[:shared].rstrip()))

    def end_of_blank(self, ends: EndTokens) -> Span | None:
        """Return the span of the end tokens of a turn without text; None where there are none."""
        text, messages = self.rendering.text, list(self.rendering.messages)
        messages[self.number] = {**self.message, "content": placeholder(self.number)}
        before, found, after = (self.renderer.try_text(messages) or "").partition(
            placeholder(self.number)
        )
        at = len(text) - len(after)
        if not (found and text.startswith(before) and text.endswith(after) and len(before) <= at):
            return None
        return at, self.end(at, ends) or at

    def next_opening(self, text_end: int, ends: EndTokens) -> str:
        """Return what to append to the last turn, if turns end with the opening of the next one.

        Generation with GLM-4.5 stops at <|user|> and <|observation|>.
        Source: huggingface.co/zai-org/GLM-4.5, generation_config.json, eos_token_id (2026-11-26)
        """
        written = self.rendering.text[text_end:]
        roles = ("tool", "user") if self.message.get("tool_calls") else ("user",)
        for role in roles:
            after = self._text_after(self._with_turn(role), text_end)
            end = ends.first(after, 0, len(after))
            if end is not None and after.startswith(written) and end > len(written):
                return after[len(written) : end]
        return ""

    def _with_turn(self, role: str) -> list[Message]:
        """Return the conversation with another turn of this role and a placeholder as content."""
        messages = self.rendering.messages
        return [*messages, {"role": role, "content": placeholder(len(messages))}]

    def _text_after(self, messages: Sequence[Message], text_end: int) -> str:
        """Return the text after the end of this turn in another list of messages that has it."""
        text, content = self.rendering.text, self.rendering.contents[self.number]
        other = self._up_to_added_turn(messages)
        if other.startswith(text[:text_end]):
            return other[text_end:]
        turn_text = text[max(content[0] if content else 0, text_end - 40) : text_end]
        if content and content[1] == text_end:  # a short content may also be in the template's text
            turn_text, changed = placeholder(self.number), list(messages)
            changed[self.number] = {
                **self.message,
                "content": think_block(self.message) + turn_text,
            }
            other = self._up_to_added_turn(changed)
        _, found, after = other.rpartition(turn_text)
        return after if found else ""

    def _up_to_added_turn(self, messages: Sequence[Message]) -> str:
        """Return the rendered text before the content of the added turn; all of it without one."""
        rendered = self.renderer.try_text(messages) or ""
        added = placeholder(len(self.rendering.messages))
        if len(messages) <= len(self.rendering.messages):
            return rendered
        return rendered.partition(added)[0] if added in rendered else ""


def _common_prefix(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # comparing slices (memcmp) is faster than comparing characters
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _before_tag(text: str, at: int) -> int:
    """Return `at`, or the start of the tag that `at` is inside of."""
    window = max(0, at - 64)
    for tag in TAG.finditer(text, window, at + 64):
        if tag.start() < at < tag.end():
            return tag.start()
    return at

"""Find where one turn of a rendered conversation begins and ends.

An answer begins where the template, asked for the opening of an answer, stops writing; it ends
with the token that ends its turn. Both follow from what the template writes for the conversation,
for its beginning, and with another answer in the same place: nothing is guessed from names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attnimg.train.data.chat_render import (
    CLOSING,
    Message,
    Renderer,
    Rendering,
    RewrittenError,
    Span,
    mark,
    reasoning_of,
    think_block,
    with_reasoning,
)

# What may open a reasoning, where the template writes no opening of an answer by itself.
OPENING = re.compile(r"[<\[][^<>\[\]]*think[^<>\[\]]*[>\]]\s*\Z", re.IGNORECASE)
TAG = re.compile(r"<[^<>\s]{1,60}>|\[[A-Z_/]{1,40}\]")
# Plain answers that share neither their first nor their last character.
PLAIN = ("1 plain answer 2", "3 plain answer 4")

UNPROMPTED = (
    "the chat template opens an answer with {!r} where generation does not; it is not the record's "
    "text and carries no loss"
)
MOVED = (
    "the chat template writes the turns before an answer differently once others follow (reasoning "
    "is removed, the system message or the tools move): all answers but the last are trained after "
    "a prompt that differs from the one at generation"
)
REASONING_REMOVED = (
    "the chat template removes the reasoning of earlier turns, so only the last turn's is trained"
)


@dataclass(frozen=True, slots=True)
class EndTokens:
    """The tokens that may end a turn.

    Attributes:
        pattern: matches one of them.
        eos: the tokenizer's own end of text.
        chosen: those that the config names (eot_tokens).
    """

    pattern: re.Pattern[str]
    eos: str | None
    chosen: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Any, chosen: tuple[str, ...]) -> EndTokens:
        """Return the tokenizer's special and added tokens, without what opens a text."""
        tokens = {*tokenizer.all_special_tokens, *chosen}
        tokens |= set(map(str, tokenizer.added_tokens_decoder.values()))
        if tokenizer.bos_token != tokenizer.eos_token:
            tokens.discard(tokenizer.bos_token)
        named = [re.escape(t) for t in tokens if t and not t.isspace() and not t.isalnum()]
        pattern = "|".join(sorted(named, key=len, reverse=True)) or r"(?!)"
        return cls(re.compile(pattern), tokenizer.eos_token, chosen)

    def first(self, text: str, start: int, limit: int) -> int | None:
        """Return the end of the token that follows at `start`, after blanks at most."""
        found = self.pattern.search(text, start, limit)
        if found is None or text[start : found.start()].strip():
            return None
        return found.end()


@dataclass(frozen=True, slots=True)
class RenderedTurn:
    """One turn of a rendered conversation, with methods that find where it stands."""

    renderer: Renderer
    rendering: Rendering
    number: int

    @property
    def message(self) -> Message:
        """The turn as the template was given it."""
        return self.rendering.messages[self.number]

    @property
    def before(self) -> int:
        """The end of the last content before this turn's; a system message may be moved behind."""
        own = self.rendering.contents[self.number]
        start = own[0] if own else len(self.rendering.text)
        earlier = self.rendering.contents[: self.number]
        return max((span[1] for span in earlier if span and span[1] <= start), default=0)

    @property
    def limit(self) -> int:
        """The start of the first content after this turn's."""
        own = self.rendering.contents[self.number]
        after = own[1] if own else self.before
        starts = [span[0] for span in self.rendering.contents if span and span != own]
        return min((start for start in starts if start >= after), default=len(self.rendering.text))

    def bounds(self, notes: dict[str, None]) -> Span:
        """Return where the turn's text begins and ends; equal where it says nothing."""
        text, content = self.rendering.text, self.rendering.contents[self.number]
        reasoning = self.reasoning(notes)
        if content is None and reasoning is None and not self.message.get("tool_calls"):
            return 0, 0
        first, end = content or (0, 0)
        if content is None or self.message.get("tool_calls"):
            low, end = self._bounds_of_calls()
            low = end - len(text[low:end].lstrip())
            first = min(first, low) if content else low
        if self.message["role"] != "assistant":
            return first, end
        prompt = self._prompt(notes)
        if prompt is None or not text.startswith(prompt) or len(prompt) > first:
            prompt = None
        if reasoning is None:
            if prompt and self.message.get("tool_calls") and not self._plain_opens(prompt, first):
                return len(prompt), end
            unasked = text[len(prompt) : first].strip() if prompt else ""
            if unasked and not self.renderer.marks:
                notes[UNPROMPTED.format(unasked)] = None
            return first, end
        # What opens the reasoning belongs to it, whether or not the template writes it unasked.
        first = reasoning - (len(text[len(prompt) : reasoning].lstrip()) if prompt else 0)
        opening = OPENING.search(text, self.before, reasoning)
        return min(first, opening.start() if opening else first), end

    def reasoning(self, notes: dict[str, None]) -> int | None:
        """Return where the turn's reasoning begins, None where there is none."""
        reasoning = reasoning_of(self.message)
        content = self.rendering.contents[self.number]
        within = content and CLOSING in self.rendering.text[slice(*content)]
        if not reasoning or (within and not self.message.get("reasoning_content")):
            return None
        # A mark, since a short reasoning may also be in the template's own text.
        text, shown = self.rendering.text, self._with_marked_reasoning()
        before, found, after = shown.partition(mark(self.number))
        if found:
            at = len(text) - len(text[len(before) :].lstrip())
            whole = text.startswith(before) and text.startswith(reasoning, at)
            ordered = self.before <= at <= (content[0] if content else self.limit)
            if whole and ordered and mark(self.number) not in after:
                return at
            raise RewrittenError(
                f"it rewrites or repeats the reasoning of message {self.number + 1}"
            )
        last = self.number == len(self.rendering.messages) - 1
        if last or mark(self.number) not in self._with_marked_reasoning(last=True):
            tags = ", or put the reasoning into the content as <think>...</think>"
            raise RewrittenError(
                f"it drops the reasoning of message {self.number + 1}",
                "set chat_template to one that writes reasoning"
                + ("" if CLOSING in self.renderer.template else tags),
            )
        notes[REASONING_REMOVED] = None
        return None

    def _with_marked_reasoning(self, *, last: bool = False) -> str:
        """Return the rendering with a mark as reasoning; with `last`, without later turns."""
        messages = list(self.rendering.messages)
        messages[self.number] = with_reasoning(self.message, mark(self.number))
        return self.renderer.attempt(messages[: self.number + 1] if last else messages) or ""

    def _prompt(self, notes: dict[str, None]) -> str | None:
        """Return what generation of this answer starts from, and compare it with what stands here.

        None where it differs, or where the template does not open an answer when it is asked to.
        """
        messages = self.rendering.messages
        prompt = self.renderer.attempt(messages[: self.number], prompt=True)
        if prompt is None or _common_prefix(prompt, self.rendering.text) >= self.before:
            return prompt if prompt != self.renderer.attempt(messages[: self.number]) else None
        moved = self.renderer.tools or any(
            message["role"] in ("system", "developer", "tool")
            or message.get("reasoning_content")
            or message.get("tool_calls")
            for message in messages
        )
        if not moved:
            raise RewrittenError("what it writes before a turn changes with what follows")
        notes[MOVED] = None
        return None

    def _bounds_of_calls(self) -> Span:
        """Return where a turn with tool calls, or with reasoning alone, begins and ends.

        A plain answer in its place shows what the template itself writes around it. What follows
        may not fit a plain answer (the result of a tool), or may change with it: so it must say
        what it says as the last turn, and is looked for by that where no plain answer fits.
        """
        text, messages = self.rendering.text, self.rendering.messages
        alone = self.renderer.attempt(messages[: self.number + 1]) or ""
        said = alone[slice(*self._around_plain(alone, messages[: self.number + 1]))]
        low, high = self._around_plain(text, messages)
        if self.before <= low < high <= self.limit and said.endswith(text[low:high]):
            return low, high
        tags = list(TAG.finditer(said))
        if tags and alone.rstrip().endswith(said.rstrip()) and said.endswith(tags[-1].group()):
            said = said[: tags[-1].start()]  # another end than a plain answer's, as Gemma 4 writes
        if said and text.count(said, self.before, self.limit) == 1:
            low = text.index(said, self.before)
            return low, low + len(said)
        raise RewrittenError(f"where message {self.number + 1} ends can't be told")

    def _around_plain(self, whole: str, messages: Sequence[Message]) -> Span:
        """Return where a rendering differs from the one with a plain answer here."""
        prefixes, suffixes = [], []
        for content in PLAIN:
            plain = {"role": self.message["role"], "content": content}
            other = self.renderer.attempt(
                [*messages[: self.number], plain, *messages[self.number + 1 :]]
            )
            prefixes.append(_common_prefix(whole, other or ""))
            suffixes.append(_common_prefix(whole[::-1], (other or "")[::-1]))
        return (
            _before_tag(whole, min(prefixes)),
            _before_tag(whole, len(whole) - min(suffixes)),
        )

    def _plain_opens(self, prompt: str, first: int) -> bool:
        """Return whether what stands before this turn's text also stands before a plain answer.

        Else it belongs to a call: gpt-oss names the channel, Muse Glimmer who is called.
        """
        plain = {"role": self.message["role"], "content": PLAIN[0]}
        whole = self.renderer.attempt([*self.rendering.messages[: self.number], plain]) or ""
        opening = whole.partition(PLAIN[0])[0][len(prompt) :]
        return opening.strip() == self.rendering.text[len(prompt) : first].strip()

    def end(self, text_end: int, ends: EndTokens) -> int | None:
        """Return the end of what ends the turn, None where nothing does.

        What is written both where the conversation ends and where it goes on belongs to the turn.
        """
        text, messages = self.rendering.text, self.rendering.messages
        ended, goes_on = text[text_end:], text[text_end : self.limit]
        if self.number + 1 < len(messages):
            ended = self._after(messages[: self.number + 1], text_end)
        else:
            goes_on = self._after(self._continued("user"), text_end) or ended
        shared = _before_tag(ended, _common_prefix(ended, goes_on))
        if not ended[:shared].strip():
            # The end depends on what follows (gpt-oss), or opens the next turn (GLM-4.5).
            return ends.first(text, text_end, self.limit)
        tokens = list(ends.pattern.finditer(ended[:shared]))
        named = [token for token in tokens if token.group() in (ends.chosen or (ends.eos,))]
        # A template that always opens an answer at its end shares that opening with other turns.
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
        """Return the span of the end of a turn without text; None where it can't be found."""
        text, messages = self.rendering.text, list(self.rendering.messages)
        messages[self.number] = {**self.message, "content": mark(self.number)}
        before, found, after = (self.renderer.attempt(messages) or "").partition(mark(self.number))
        at = len(text) - len(after)
        if not (found and text.startswith(before) and text.endswith(after) and len(before) <= at):
            return None
        return at, self.end(at, ends) or at

    def following(self, text_end: int, ends: EndTokens) -> str:
        """Return what to append to the last turn, whose end is the opening of the next one.

        GLM-4.5 is stopped by <|user|> and <|observation|>.
        Source: huggingface.co/zai-org/GLM-4.5, generation_config.json, eos_token_id (2026-11-26)
        """
        written = self.rendering.text[text_end:]
        roles = ("tool", "user") if self.message.get("tool_calls") else ("user",)
        for role in roles:
            after = self._after(self._continued(role), text_end)
            end = ends.first(after, 0, len(after))
            if end is not None and after.startswith(written) and end > len(written):
                return after[len(written) : end]
        return ""

    def _continued(self, role: str) -> list[Message]:
        """Return the conversation with one more turn of this role, whose content is a mark."""
        messages = self.rendering.messages
        return [*messages, {"role": role, "content": mark(len(messages))}]

    def _after(self, messages: Sequence[Message], text_end: int) -> str:
        """Return the text after the end of this turn in another list of messages that has it."""
        text, content = self.rendering.text, self.rendering.contents[self.number]
        other = self._up_to_mark(messages)
        if other.startswith(text[:text_end]):
            return other[text_end:]
        said = text[max(content[0] if content else 0, text_end - 40) : text_end]
        if content and content[1] == text_end:  # the template's own text may have short ones, too
            said, changed = mark(self.number), list(messages)
            changed[self.number] = {**self.message, "content": think_block(self.message) + said}
            other = self._up_to_mark(changed)
        _, found, after = other.rpartition(said)
        return after if found else ""

    def _up_to_mark(self, messages: Sequence[Message]) -> str:
        """Return the rendered text before the content of the added turn; all of it without one."""
        whole = self.renderer.attempt(messages) or ""
        added = mark(len(self.rendering.messages))
        if len(messages) <= len(self.rendering.messages):
            return whole
        return whole.partition(added)[0] if added in whole else ""


def _common_prefix(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared at the speed of memcmp, characters are not
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _before_tag(text: str, at: int) -> int:
    """Return `at`, or the start of the tag that it would cut in two."""
    window = max(0, at - 64)
    for tag in TAG.finditer(text, window, at + 64):
        if tag.start() < at < tag.end():
            return tag.start()
    return at

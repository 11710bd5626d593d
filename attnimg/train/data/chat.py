"""Encode conversations: render them with a chat template, and label the answers.

render -> locate the contents -> find the spans of the answers -> tokenize -> label by character
offsets. Conversations of plain messages share a layout with all others that have the same roles.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnimg.config.schema import TrainedEnds
from attnimg.errors import AttnimgError
from attnimg.train.data.chat_labels import label_parts, label_tokens, with_full_offsets
from attnimg.train.data.chat_layout import (
    AnswerLayout,
    SharedLayout,
    build_layout,
    build_shared_layout,
)
from attnimg.train.data.chat_render import (
    THINK_END,
    Message,
    Renderer,
    RewrittenError,
    TemplateError,
    message_forms,
    render,
    template_reads,
)
from attnimg.train.data.chat_templates import TemplateLimitError
from attnimg.train.data.chat_turn import EndTokens, RenderedTurn
from attnimg.train.data.records import (
    Conversation,
    Parsed,
    Place,
    Span,
    Turn,
    bad_file,
    shorten,
    unused_warning,
)

EMPTY_ANSWERS = "answers without text are not trained: the model would learn to give empty answers"


class ChatEncoder:
    """Encode conversations; the turns of the trained roles have loss.

    Args:
        tokenizer: a transformers tokenizer that returns character offsets (a "fast" one).
        template: the chat template in Jinja; or several by name, of which "tool_use" is used for
            conversations with tools and "default" for all others.
        trained_roles: roles whose turns are trained, as the template names them.
        train_on_eos: which turns' end tokens are trained: of trained turns ("turn"), of every
            turn ("all"), of the last trained one ("last"), or of none.
        train_on_inputs: whether every token is trained.
        eot_tokens: texts that end a turn, besides the tokenizer's special tokens.
        train_on_eot: the same for the eot_tokens alone; None: as train_on_eos.
        thinking_key: what the template calls the reasoning of a message.
        template_kwargs: other variables of the template.
        system_message: inserted before conversations without a system turn; None for none.

    Raises:
        AttnimgError: the tokenizer returns no offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | Mapping[str, str],
        *,
        trained_roles: frozenset[str] = frozenset({"assistant"}),
        train_on_eos: TrainedEnds = "turn",
        train_on_eot: TrainedEnds | None = None,
        train_on_inputs: bool = False,
        eot_tokens: tuple[str, ...] = (),
        thinking_key: str = "reasoning_content",
        template_kwargs: Mapping[str, Any] | None = None,
        system_message: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            what = "the tokenizer does not support conversations"
            why = f"{type(tokenizer).__name__} returns no character offsets, needed to find answers"
            do = "use the model's fast tokenizer (tokenizer.json)"
            raise AttnimgError(what, why=why, do=do, code="bad-value", key="tokenizer_type")
        self.tokenizer = with_full_offsets(tokenizer)
        self.templates = {"default": template} if isinstance(template, str) else dict(template)
        self.given, self.trained_roles = tokenizer, trained_roles
        self.train_on_eos, self.train_on_eot = train_on_eos, train_on_eot or train_on_eos
        self.thinking_key, self.template_kwargs = thinking_key, dict(template_kwargs or {})
        self.train_on_inputs, self.system_message = train_on_inputs, system_message
        self.ends = EndTokens.from_tokenizer(tokenizer, eot_tokens)
        self.shared: dict[tuple[tuple[str, bool], ...], SharedLayout | None] = {}
        self.warnings: dict[str, None] = {}
        text = "".join(self.templates.values())
        if thinking_key != "reasoning_content" and not template_reads(text, thinking_key):
            self.warnings[unused_warning("template_thinking_key", (thinking_key,))] = None
        unread = [n for n in self.template_kwargs if not re.search(rf"\b{re.escape(n)}\b", text)]
        if unread:
            self.warnings[unused_warning("chat_template_kwargs", unread)] = None

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[tuple[list[int], list[int]]]:
        """Encode conversations to input_ids and labels.

        Raises:
            AttnimgError: the template raises or drops text; the message names the record.
        """
        written = list[_Written]()
        for place, parsed in batch:
            assert isinstance(parsed, Conversation), place
            conversation = self._with_system_message(parsed)
            try:
                layout = self._build_layout(conversation)
                masked = list(self._masked_spans(conversation, layout))
            except (TemplateError, TemplateLimitError, RewrittenError) as error:
                raise self._template_error(conversation, place, error) from None
            self.warnings |= dict.fromkeys(layout.warnings)
            self._warn_of_unused(conversation)
            written.append(
                _Written(
                    layout.rendering.text + layout.appended,
                    list(self._trained_spans(conversation, layout)),
                    masked,
                    list(self._trained_parts(conversation, layout)),
                )
            )
        encoded = self._tokenize([one.text for one in written])
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True)
        return [
            (ids, self._label(ids, offsets, conversation)) for ids, offsets, conversation in tokens
        ]

    def _tokenize(self, texts: list[str], *, given: bool = False) -> Any:
        tokenizer = self.given if given else self.tokenizer
        return tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )

    def _label(self, ids: list[int], offsets: Sequence[Span], found: _Written) -> list[int]:
        labels = label_tokens(ids, found.text, offsets, trained=found.trained, masked=found.masked)
        if found.parts:
            # axolotl finds the tokens of a part by the tokenizer's own offsets.
            own = self._tokenize([found.text], given=True)["offset_mapping"][0]
            for content, parts in found.parts:
                label_parts(ids, labels, own, content=content, parts=parts)
        return labels

    def _with_system_message(self, conversation: Conversation) -> Conversation:
        turns = conversation.turns
        if not self.system_message or turns[0].role in ("system", "developer"):
            return conversation
        return replace(conversation, turns=(Turn("system", self.system_message), *turns))

    def _is_trained(self, turn: Turn) -> bool:
        return turn.role in self.trained_roles if turn.train is None else turn.train

    def _needs_bounds(self, turn: Turn) -> bool:
        """Return whether a turn's bounds are needed: to train it or its end, or to mask it."""
        settings = {self.train_on_eos, self.train_on_eot}
        if self.train_on_inputs and (turn.train is False or settings & {"last", "none"}):
            return True
        ends = "all" in settings and turn.role == "assistant"
        return ends or self._is_trained(turn)

    def _renderer(self, conversation: Conversation) -> Renderer:
        tools = conversation.tools
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        return Renderer(
            self.tokenizer, self.templates[name], tools, self.thinking_key, self.template_kwargs
        )

    def _build_layout(self, conversation: Conversation) -> AnswerLayout:
        """Find the answers, with the shared layout of conversations with these roles if it fits."""
        renderer, turns = self._renderer(conversation), conversation.turns
        bounded = [self._needs_bounds(turn) for turn in turns]
        if not conversation.tools and all(
            not turn.extra and (turn.content or "").strip() for turn in turns
        ):
            roles = [turn.role for turn in turns]
            key = tuple(zip(roles, bounded, strict=True))
            if key not in self.shared:
                self.shared[key] = build_shared_layout(renderer, roles, bounded, self.ends)
            messages: tuple[Message, ...] = tuple(
                {"role": turn.role, "content": turn.content} for turn in turns
            )
            text = renderer.text(messages)
            if (shared := self.shared[key]) and (layout := shared.fit(messages, text)):
                return layout
        errors = list[TemplateError | RewrittenError]()
        for given, form in message_forms(renderer, conversation):
            try:
                return build_layout(given, render(given, form), bounded, self.ends)
            except (TemplateError, RewrittenError) as error:
                errors.append(error)
        # A fault in rendered text is more informative than the error of another message form.
        raise next((error for error in errors if isinstance(error, RewrittenError)), errors[0])

    def _trained_spans(self, conversation: Conversation, layout: AnswerLayout) -> Iterator[Span]:
        """Yield the spans to train: texts of answers, and ends of turns."""
        if self.train_on_inputs:
            yield 0, len(layout.rendering.text) + len(layout.appended)
            return
        answers = [a for a in layout.answers if self._is_trained(conversation.turns[a.turn])]
        text = layout.rendering.text + layout.appended
        for answer in answers:
            if conversation.turns[answer.turn].parts is None:
                yield from answer.text
            for setting, span in self._ends(text, answer.end):
                if setting == "turn" or (setting == "last" and answer is answers[-1]):
                    yield span
        if "all" in (self.train_on_eos, self.train_on_eot):
            ends = self._ends(text, self._all_ends(layout))
            yield from (span for setting, span in ends if setting == "all")

    def _ends(self, text: str, spans: Iterable[Span]) -> Iterator[tuple[TrainedEnds, Span]]:
        """Yield each end of a turn with its setting: the eot_tokens may have one of their own."""
        for start, end in spans:
            if self.train_on_eot == self.train_on_eos:
                yield self.train_on_eos, (start, end)
                continue
            for token in self.ends.pattern.finditer(text, start, end):
                is_eot = token.group() in self.ends.configured
                yield self.train_on_eot if is_eot else self.train_on_eos, (start, token.end())
                start = token.end()

    def _trained_parts(
        self, conversation: Conversation, layout: AnswerLayout
    ) -> Iterator[tuple[Span, list[Span]]]:
        """Yield the span of each content of which only parts are trained, and these parts."""
        rendering = layout.rendering
        for turn, message, span in zip(
            conversation.turns, rendering.messages, rendering.contents, strict=True
        ):
            if span is None or turn.parts is None or not self._is_trained(turn):
                continue
            offset = _content_offset(turn, message, rendering.text, span)
            yield span, [(start + offset, end + offset) for start, end in turn.parts]

    def _all_ends(self, layout: AnswerLayout) -> Iterator[Span]:
        """Yield the end tokens of all turns: after an answer, or after another turn's text."""
        text = layout.rendering.text + layout.appended
        ends = [span for answer in layout.answers for span in answer.end]
        yield from ends
        known = {token for a, b in ends for token in self.ends.pattern.findall(text[a:b])}
        known |= {self.tokenizer.eos_token, *self.ends.configured}
        answers = {answer.turn for answer in layout.answers}
        starts = [span[0] for span in layout.rendering.contents if span]
        for number, span in enumerate(layout.rendering.contents):
            if span is None or number in answers:
                continue
            limit = min((start for start in starts if start >= span[1]), default=len(text))
            end = self.ends.first(text, span[1], limit)
            if end is not None and text[span[1] : end].strip() in known:
                yield span[1], end

    def _masked_spans(self, conversation: Conversation, layout: AnswerLayout) -> Iterator[Span]:
        """Yield the spans that are excluded from the loss."""
        if self.train_on_inputs:
            yield from self._untrained_input_spans(conversation, layout)
        rendering = layout.rendering
        for turn, message, span in zip(
            conversation.turns, rendering.messages, rendering.contents, strict=True
        ):
            if span is None or not turn.untrained:
                continue
            offset = _content_offset(turn, message, rendering.text, span)
            for start, end in turn.untrained:
                yield max(span[0], start + offset), min(span[1], end + offset)

    def _untrained_input_spans(
        self, conversation: Conversation, layout: AnswerLayout
    ) -> Iterator[Span]:
        """Yield what train_on_inputs excludes: untrained turns or parts, and some end tokens.

        axolotl trains the end token of a turn with loss, or of every turn with train_on_eos: all.
        Source: axolotl 067b021c, prompt_strategies/chat_template.py:502-630 (2026-11-27)
        """
        turns, found = conversation.turns, {answer.turn for answer in layout.answers}
        text = layout.rendering.text + layout.appended
        settings = {self.train_on_eos, self.train_on_eot}
        for number, turn in enumerate(turns):
            if number in found or turn.train is not False or settings == {"all"}:
                continue
            blank = RenderedTurn(self._renderer(conversation), layout.rendering, number)
            if (end := blank.end_of_blank(self.ends)) is None:
                raise RewrittenError(
                    f"message {number + 1} has no text, so its end token cannot be found",
                    f"remove message {number + 1}, or set train_on_inputs: false",
                )
            yield from (span for setting, span in self._ends(text, [end]) if setting != "all")
        with_loss = [answer for answer in layout.answers if turns[answer.turn].train is not False]
        for answer in layout.answers:
            untrained = turns[answer.turn].train is False
            if untrained or turns[answer.turn].parts is not None:
                yield from answer.text
            for setting, span in self._ends(text, answer.end):
                last = setting == "last" and answer is not with_loss[-1]
                if (untrained and setting != "all") or setting == "none" or last:
                    yield span

    def _warn_of_unused(self, conversation: Conversation) -> None:
        """Add warnings on unused columns and message keys, and on empty answers."""
        template = self._renderer(conversation).template
        keys = dict.fromkeys(
            key
            for turn in conversation.turns
            for key in turn.extra
            if not template_reads(template, key) and key not in ("reasoning_content", "tool_calls")
        )
        for what, names in (("columns", conversation.unused), ("message keys", tuple(keys))):
            if names:
                self.warnings[unused_warning(what, names)] = None
        if any(
            self._is_trained(turn)
            and not (turn.content or "").strip()
            and not {"tool_calls", "reasoning_content"} & turn.extra.keys()
            for turn in conversation.turns
        ):
            self.warnings[EMPTY_ANSWERS] = None

    def _template_error(
        self,
        conversation: Conversation,
        place: Place,
        error: TemplateError | TemplateLimitError | RewrittenError,
    ) -> AttnimgError:
        """Return the error for a template that fails on a record, exceeds a limit or drops text."""
        if isinstance(error, TemplateError):
            roles = ", ".join(turn.role for turn in conversation.turns)
            what = f"the chat template raises an error: {place}"
            why = f"it raises: {error}; the roles are {roles}"
            do = "correct the record, or set chat_template to one that accepts these roles"
            return bad_file(what, why=why, do=do, key=place.key)
        what, why = f"the chat template exceeds a limit: {place}", str(error)
        do = "set chat_template to another one, or correct this one"
        if isinstance(error, RewrittenError):
            template = shorten(self._renderer(conversation).template)
            what, do = f"the chat template cannot be used for training: {place}", error.do
            why = f"{why}, so the trained text would not be the record's\ntemplate: {template}"
        return AttnimgError(what, why=why, do=do, code="bad-value", key="chat_template")


@dataclass(frozen=True, slots=True)
class _Written:
    """A rendered conversation: its text, and spans that are trained, masked or trained in part."""

    text: str
    trained: list[Span]
    masked: list[Span]
    parts: list[tuple[Span, list[Span]]]


def _content_offset(turn: Turn, message: Message, text: str, span: Span) -> int:
    """Return the index in the text at which a message's unstripped content would begin.

    Raises:
        RewrittenError: the template does not write the content as it is in the record.
    """
    content, written = turn.content or "", text[slice(*span)]
    if message.get("content") != content or (THINK_END in content and THINK_END not in written):
        raise RewrittenError("it rewrites a content that has untrained parts")
    # The template may have stripped the content; spans are relative to the unstripped one.
    return span[0] - content.rfind(written)

"""Encode conversations: render them with a chat template, and label the answers.

render -> locate the contents -> find the spans of the answers -> tokenize -> label by character
offsets. Conversations of plain messages share a layout with all others that have the same roles.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from attnimg.errors import AttnimgError
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
    Span,
    TemplateError,
    message_forms,
    render,
    template_reads,
)
from attnimg.train.data.chat_templates import TemplateLimitError
from attnimg.train.data.chat_turn import EndTokens, RenderedTurn
from attnimg.train.data.records import (
    IGNORE_INDEX,
    Conversation,
    Parsed,
    Place,
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
        train_on_eos: Literal["all", "turn", "last", "none"] = "turn",
        train_on_inputs: bool = False,
        eot_tokens: tuple[str, ...] = (),
        system_message: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            what = "the tokenizer does not support conversations"
            why = f"{type(tokenizer).__name__} returns no character offsets, needed to find answers"
            do = "use the model's fast tokenizer (tokenizer.json)"
            raise AttnimgError(what, why=why, do=do, code="bad-value", key="tokenizer_type")
        self.tokenizer = _with_full_offsets(tokenizer)
        self.templates = {"default": template} if isinstance(template, str) else dict(template)
        self.trained_roles, self.train_on_eos = trained_roles, train_on_eos
        self.train_on_inputs, self.system_message = train_on_inputs, system_message
        self.ends = EndTokens.from_tokenizer(tokenizer, eot_tokens)
        self.shared: dict[tuple[tuple[str, bool], ...], SharedLayout | None] = {}
        self.warnings: dict[str, None] = {}

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[tuple[list[int], list[int]]]:
        """Encode conversations to input_ids and labels.

        Raises:
            AttnimgError: the template raises or drops text; the message names the record.
        """
        written = list[tuple[str, list[Span], list[Span]]]()
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
            text = layout.rendering.text + layout.appended
            written.append((text, list(self._trained_spans(conversation, layout)), masked))
        encoded = self.tokenizer(
            [text for text, _, _ in written],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], written, strict=True)
        return [
            (ids, label_tokens(ids, text, offsets, trained=trained, masked=masked))
            for ids, offsets, (text, trained, masked) in tokens
        ]

    def _with_system_message(self, conversation: Conversation) -> Conversation:
        turns = conversation.turns
        if not self.system_message or turns[0].role in ("system", "developer"):
            return conversation
        return replace(conversation, turns=(Turn("system", self.system_message), *turns))

    def _is_trained(self, turn: Turn) -> bool:
        return turn.role in self.trained_roles if turn.train is None else turn.train

    def _needs_bounds(self, turn: Turn) -> bool:
        """Return whether a turn's bounds are needed: to train it or its end, or to mask it."""
        if self.train_on_inputs and (turn.train is False or self.train_on_eos in ("last", "none")):
            return True
        ends = self.train_on_eos == "all" and turn.role == "assistant"
        return ends or self._is_trained(turn)

    def _renderer(self, conversation: Conversation) -> Renderer:
        tools = conversation.tools
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        return Renderer(self.tokenizer, self.templates[name], tools)

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
        for answer in answers:
            yield from answer.text
            last = answer is answers[-1]
            if self.train_on_eos == "turn" or (self.train_on_eos == "last" and last):
                yield from answer.end
        if self.train_on_eos == "all":
            yield from self._all_ends(layout)

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
            if span is None or turn.content is None or not turn.untrained:
                continue
            written = rendering.text[slice(*span)]
            if message.get("content") != turn.content or (
                THINK_END in turn.content and THINK_END not in written
            ):
                raise RewrittenError("it rewrites a content that has untrained parts")
            # The template may have stripped the content; spans are relative to the unstripped one.
            offset = span[0] - turn.content.rfind(written)
            for start, end in turn.untrained:
                yield max(span[0], start + offset), min(span[1], end + offset)

    def _untrained_input_spans(
        self, conversation: Conversation, layout: AnswerLayout
    ) -> Iterator[Span]:
        """Yield what train_on_inputs excludes: turns with `train: false`, and some end tokens.

        axolotl trains the end token of a turn with loss, or of every turn with train_on_eos: all.
        Source: axolotl 067b021c, prompt_strategies/chat_template.py:502-630 (2026-11-27)
        """
        turns, found = conversation.turns, {answer.turn for answer in layout.answers}
        for number, turn in enumerate(turns):
            if number in found or turn.train is not False or self.train_on_eos == "all":
                continue
            blank = RenderedTurn(self._renderer(conversation), layout.rendering, number)
            if (end := blank.end_of_blank(self.ends)) is None:
                raise RewrittenError(
                    f"message {number + 1} has no text, so its end token cannot be found",
                    f"remove message {number + 1}, or set train_on_inputs: false",
                )
            yield end
        with_loss = [answer for answer in layout.answers if turns[answer.turn].train is not False]
        for answer in layout.answers:
            if turns[answer.turn].train is False:
                yield from answer.text
                if self.train_on_eos != "all":
                    yield from answer.end
            elif self.train_on_eos == "none" or (
                self.train_on_eos == "last" and answer is not with_loss[-1]
            ):
                yield from answer.end

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


def _with_full_offsets(tokenizer: Any) -> Any:
    """Return a tokenizer with the same ids, whose offsets cover all characters of a token.

    Byte-level tokenizers exclude whitespace from the offsets (trim_offsets). A token of a newline
    and a blank then covers only the newline, and the blank of the answer is not found.
    """
    from tokenizers import Tokenizer, models

    def untrim(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"trim_offsets": False} if part.get("trim_offsets") else part

    holder = Tokenizer(models.BPE())
    holder.post_processor = tokenizer.backend_tokenizer.post_processor
    written = holder.to_str()
    untrimmed = json.loads(written, object_hook=untrim)
    if untrimmed == json.loads(written):
        return tokenizer
    untrimmed_copy = copy.deepcopy(tokenizer)  # the original is saved with the model
    untrimmed_copy.backend_tokenizer.post_processor = Tokenizer.from_str(
        json.dumps(untrimmed)
    ).post_processor
    return untrimmed_copy


def label_tokens(
    ids: list[int],
    text: str,
    offsets: Sequence[Span],
    *,
    trained: Sequence[Span],
    masked: Sequence[Span] = (),
) -> list[int]:
    """Return labels: the ids of tokens that cover a character of a trained span, else IGNORE_INDEX.

    Blanks between two tokens belong to the second one, since tokenizers may exclude them from its
    offsets. Other characters between two tokens were removed by a normalizer (an accent, a
    zero-width space), and belong to neither. A token that shares only blanks with a span is not
    part of it, unless the token has no other characters: the first token of an answer may begin
    with the blank before the answer.
    """
    spans = [(*span, True) for span in trained] + [(*span, False) for span in masked]
    spans.sort(key=lambda span: (span[0], not span[2]))
    labels, reached, first = [IGNORE_INDEX] * len(ids), 0, 0
    for index, (start, end) in enumerate(offsets):
        # A blank that the tokenizer inserts may have offsets after those of the next token.
        removed = len(text[reached:start].rstrip()) if start < end else 0
        low, high = min(start, reached + removed), max(end, reached)
        reached = high
        while first < len(spans) and spans[first][1] <= low:
            first += 1
        for a, b, is_trained in spans[first:]:
            if a >= high:
                break
            inside = text[max(a, low) : min(b, high)]
            if inside and (inside.strip() or not text[low:high].strip()):
                labels[index] = ids[index] if is_trained else IGNORE_INDEX
    return labels

"""Render conversations with a chat template and say exactly which tokens carry loss.

A template is rendered once for each sequence of roles with a marker in place of every content.
What stands between the markers is the template's own text. A conversation's rendering must be
that text with the contents put in; then every span is known to the character. A template for
which this does not hold, or that shows a turn what comes after it, is refused: never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from attnimg.errors import AttnimgError
from attnimg.train.data.documents import IGNORED
from attnimg.train.data.parsed import Pair, Parsed, Turn
from attnimg.train.data.records import Place

Span = tuple[int, int]  # first character and the one after the last


class ChatEncoder:
    """Encode conversations; loss falls on the turns of the trained roles.

    Args:
        tokenizer: a transformers tokenizer that gives character offsets (a "fast" one).
        template: the chat template, Jinja.
        trained_roles: roles whose turns carry loss, in the template's terms.
        train_on_eos: which turns' end tokens carry loss: of trained turns ("turn"), of every
            turn ("all"), of the last one ("last"), or of none.
        train_on_inputs: whether every token carries loss.
        eot_tokens: texts that end a turn; empty: the tokenizer's special tokens.
        system_message: put before conversations without a system turn; None for nothing.

    Raises:
        AttnimgError: the tokenizer gives no offsets.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        *,
        trained_roles: frozenset[str] = frozenset({"assistant"}),
        train_on_eos: Literal["all", "turn", "last", "none"] = "turn",
        train_on_inputs: bool = False,
        eot_tokens: tuple[str, ...] = (),
        system_message: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise AttnimgError(
                "this tokenizer can't be used for conversations",
                why=f"{type(tokenizer).__name__} gives no character offsets, which tell the "
                "tokens of a turn from those of its prompt",
                do="use the model's fast tokenizer (tokenizer.json)",
                code="bad-value",
                key="tokenizer_type",
            )
        self.tokenizer, self.template = tokenizer, template
        self.trained_roles, self.train_on_eos = trained_roles, train_on_eos
        self.train_on_inputs, self.system_message = train_on_inputs, system_message
        special = {
            *tokenizer.all_special_tokens,
            *map(str, tokenizer.added_tokens_decoder.values()),
        }
        self.ends = eot_tokens or tuple(sorted(special - {""}, key=len, reverse=True))
        self.literals: dict[tuple[str, ...], tuple[str, ...]] = {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Say where trained turns have no end token, so that the model can't learn to stop."""
        if self.train_on_eos == "none" or not any(
            role in self.trained_roles and not self._end(literals, index)
            for roles, literals in self.literals.items()
            for index, role in enumerate(roles)
        ):
            return ()
        return (
            "the chat template ends a turn with no token that the tokenizer knows as special, so "
            "the model will not learn to stop; set eot_tokens to the text that ends a turn",
        )

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[tuple[list[int], list[int]]]:
        """Encode conversations to input_ids and labels."""
        texts, spans = [], []
        for place, parsed in batch:
            assert not isinstance(parsed, Pair), place
            turns = parsed
            if self.system_message and turns[0].role != "system":
                turns = (Turn("system", self.system_message), *turns)
            text = self._render(turns, place)
            texts.append(text)
            spans.append(list(self._trained(turns, self._contents(turns, text, place), text)))
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return [
            (ids, list(ids) if self.train_on_inputs else _labels(ids, offsets, trained))
            for ids, offsets, trained in zip(
                encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
            )
        ]

    def _render(self, turns: Sequence[Turn], place: Place) -> str:
        import jinja2

        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False
            )
        except (jinja2.TemplateError, ArithmeticError, TypeError) as error:
            raise AttnimgError(
                f"the chat template refuses {place}",
                why=f"it says: {error}; the roles are {', '.join(turn.role for turn in turns)}",
                do="mend the record, or set chat_template to one that takes these roles",
                code="bad-data",
                key=f"{place.key}.path",
            ) from None
        return str(text)

    def _contents(self, turns: Sequence[Turn], text: str, place: Place) -> list[Span]:
        """Find each turn's content in the rendered text."""
        literals = self._literals(turns, place)
        if not text.startswith(literals[0]):
            raise self._refusal(place, "its text before the first turn depends on the content")
        spans = []
        at = len(literals[0])
        for number, (turn, after) in enumerate(zip(turns, literals[1:], strict=True), start=1):
            whole = turn.content
            for content in (whole, whole.strip(), whole.lstrip(), whole.rstrip()):
                if text.startswith(content + after, at):
                    break
            else:
                raise self._refusal(place, f"it rewrites the content of turn {number}")
            spans.append((at, at + len(content)))
            at += len(content) + len(after)
        if at != len(text):
            raise self._refusal(place, "its text after the last turn depends on the content")
        return spans

    def _literals(self, turns: Sequence[Turn], place: Place) -> tuple[str, ...]:
        """Give the template's own text around n contents, n + 1 pieces, for these roles."""
        roles = tuple(turn.role for turn in turns)
        if roles not in self.literals:
            marks = [f"(content {number} of a turn)" for number in range(len(roles))]
            marked = [Turn(role, mark) for role, mark in zip(roles, marks, strict=True)]
            text = self._render(marked, place)
            pieces, rest = [], text
            for mark in marks:
                if rest.count(mark) != 1:
                    raise self._refusal(place, "it drops, repeats or reorders turns")
                piece, rest = rest.split(mark)
                pieces.append(piece)
            for index, role in enumerate(roles):
                before = marked[:index]
                if role in self.trained_roles and any(turn.role != "system" for turn in before):
                    self._check_prefix(self._render(before, place), text, place)
            self.literals[roles] = (*pieces, rest)
        return self.literals[roles]

    def _check_prefix(self, before: str, text: str, place: Place) -> None:
        """Refuse a template whose rendering of the turns before an answer changes with it."""
        if not text.startswith(before):
            raise self._refusal(place, "what it writes before a turn changes with what follows")

    def _trained(self, turns: Sequence[Turn], spans: list[Span], text: str) -> Iterator[Span]:
        """Yield the spans that carry loss: contents of trained roles, and end tokens."""
        literals = self.literals[tuple(turn.role for turn in turns)]
        for index, (turn, (start, end)) in enumerate(zip(turns, spans, strict=True)):
            trained = turn.role in self.trained_roles
            if trained:
                yield start, end
            last = index == len(turns) - 1
            if {
                "all": True, "turn": trained, "last": last, "none": False,
            }[self.train_on_eos]:  # fmt: skip
                yield end, min(end + self._end(literals, index), len(text))

    def _end(self, literals: tuple[str, ...], index: int) -> int:
        """Measure the end token of a turn, with blanks before it; 0 where there is none.

        A special token that opens the first turn opens the others too, so it ends none.
        """
        after = literals[index + 1]
        stripped = after.lstrip()
        for token in self.ends:
            opens = token in literals[0] and token != self.tokenizer.eos_token
            if stripped.startswith(token) and not opens:
                return len(after) - len(stripped) + len(token)
        return 0

    def _refusal(self, place: Place, why: str) -> AttnimgError:
        name = self.template if len(self.template) <= 60 else self.template[:57] + "..."
        return AttnimgError(
            f"the chat template can't be used for training: {place}",
            why=f"{why}, so the tokens of a turn can't be told from those of its prompt\n"
            f"template: {name}",
            do="set chat_template to one whose turns stand one after another, such as chatml",
            code="bad-value",
            key="chat_template",
        )


def _labels(ids: list[int], offsets: Sequence[Span], trained: list[Span]) -> list[int]:
    """Label the tokens that start inside a trained span; spans and offsets are in order."""
    labels = [IGNORED] * len(ids)
    remaining = iter(trained)
    span = next(remaining, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if start >= span[0] and end > start:
            labels[index] = ids[index]
    return labels

"""Find which characters of a rendered conversation carry loss: its answers, and what ends them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnimg.train.data.chat_calls import check_tools
from attnimg.train.data.chat_render import Renderer, Rendering, Span
from attnimg.train.data.chat_turn import Ends, RenderedTurn

NO_END = (
    "the chat template writes nothing after an answer, so the model will not learn to stop; "
    "set chat_template to one that ends each turn with a token"
)
UNMARKED_END = (
    "the chat template leaves the token that ends an answer out of its {% generation %} block, so "
    "the model will not learn to stop; move {% endgeneration %} behind that token"
)
PARTLY_MARKED = (
    "the chat template leaves a part of an answer out of its {% generation %} block, so that it "
    "carries no loss"
)
RESTORED = (
    "the chat template drops the reasoning of every answer; it is restored before the last answer, "
    "where the model generates it"
)


@dataclass(frozen=True, slots=True)
class Answer:
    """A turn with loss.

    Attributes:
        turn: its number, from 0.
        text: the spans of what it says.
        end: the spans of what ends it, empty where nothing does.
    """

    turn: int
    text: tuple[Span, ...]
    end: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation with its answers.

    Attributes:
        rendering: what was rendered.
        answers: the turns with loss.
        appended: what must be added, because the template ends a turn with the next one's opening.
        notes: sentences on what a person should know.
    """

    rendering: Rendering
    answers: tuple[Answer, ...]
    appended: str
    notes: tuple[str, ...]


def lay_out(
    renderer: Renderer, rendering: Rendering, trained: Sequence[bool], ends: Ends
) -> Layout:
    """Find the answers of a rendered conversation.

    Args:
        renderer: the template.
        rendering: the conversation, its contents located.
        trained: whether each turn carries loss.
        ends: the tokens that may end a turn.

    Raises:
        RewrittenError: the template drops part of a turn, or does not show where it ends.
    """
    check_tools(renderer, rendering)
    generated = renderer.generated(rendering.messages)
    notes, bounds, stops = dict[str, None](), dict[int, Span](), dict[int, int]()
    if renderer.restores:
        notes[RESTORED] = None
    for number, message in enumerate(rendering.messages):
        turn = RenderedTurn(renderer, rendering, number)
        # A marked span belongs to one of all answers, so that all must be known to share them out.
        if trained[number] or (generated and message["role"] == "assistant"):
            start, text_end = turn.bounds(notes)
            if start < text_end:
                bounds[number] = start, text_end
                if generated:
                    stops[number] = turn.end(text_end, ends) or text_end
        else:
            turn.reasoning(notes)  # refused where it is dropped, trained or not
    answers, appended = list[Answer](), ""
    speakers = [n for n, message in enumerate(rendering.messages) if message["role"] == "assistant"]
    last = max([*bounds, *speakers], default=0)
    for number, (start, text_end) in bounds.items():
        if not trained[number]:
            continue
        turn = RenderedTurn(renderer, rendering, number)
        # What is marked before its text, or after the next content, is of an answer without text.
        spans = [
            (a, min(b, turn.limit))
            for a, b in _owned(generated, number, bounds, stops, last=last)
            if b > start and a < turn.limit
        ]
        if not spans:
            end = turn.end(text_end, ends)
            if end is None and number == len(rendering.messages) - 1:
                appended = turn.following(text_end, ends)
                end = len(rendering.text) + len(appended) if appended else None
                if appended:
                    notes[_appended(appended.strip())] = None
            spans = [(start, end or text_end)]
        reached = start
        for a, b in sorted(spans):
            if rendering.text[reached : max(reached, min(a, text_end))].strip():
                notes[PARTLY_MARKED] = None
            reached = max(reached, b)
        if rendering.text[reached:text_end].strip():
            notes[PARTLY_MARKED] = None
        end = max(b for _, b in spans)
        ending = (rendering.text + appended)[text_end:end]
        if not ending.strip():
            notes[UNMARKED_END if generated else NO_END] = None
        elif not ends.pattern.search(ending):
            notes[_not_one_token(ending.strip())] = None
        elif ends.chosen and not any(token in ending for token in ends.chosen):
            notes[_not_chosen(ends.chosen, ending.strip())] = None
        answers.append(
            Answer(
                number,
                tuple((a, min(b, text_end)) for a, b in spans if a < text_end),
                tuple((max(a, text_end), b) for a, b in spans if b > text_end),
            )
        )
    return Layout(rendering, tuple(answers), appended, tuple(notes))


def _appended(end: str) -> str:
    return (
        f"the chat template ends a turn by opening the next one, with {end!r}; it is added after "
        "the last answer, so that the model learns to stop"
    )


def _not_chosen(chosen: tuple[str, ...], end: str) -> str:
    return (
        f"eot_tokens ({', '.join(chosen)}) do not end the answers that the chat template writes; "
        f"{end!r} does, and is trained"
    )


def _not_one_token(end: str) -> str:
    return (
        f"the chat template ends a turn with {end!r}, which the tokenizer does not know as one "
        f"token; generation stops at one token: add it with `tokens: [{end!r}]`"
    )


def _owned(
    generated: Sequence[Span],
    number: int,
    bounds: Mapping[int, Span],
    stops: Mapping[int, int],
    *,
    last: int,
) -> list[Span]:
    """Return the marked spans of a turn: those that start before the end of its answer.

    The end of an answer may have a marked span of its own. Spans after all answers belong to the
    last turn, since Phi-3's template ends the conversation there.
    """
    return [
        span
        for span in generated
        if number
        == next((n for n, (_, end) in bounds.items() if span[0] <= end or span[0] < stops[n]), last)
    ]

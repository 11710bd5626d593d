"""Share one layout among conversations of plain messages that have the same roles.

The layout is found once, for a conversation with marks in place of contents. Other conversations
with the same template text between their contents have their answers at the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnimg.train.data.chat_layout import Answer, Layout, lay_out
from attnimg.train.data.chat_render import (
    Literals,
    Renderer,
    Rendering,
    RewrittenError,
    Span,
    TemplateError,
    literals_between,
    mark,
    render,
)
from attnimg.train.data.chat_turn import Ends


@dataclass(frozen=True, slots=True)
class Shape:
    """The template's text and the layout that all conversations with the same roles share.

    Attributes:
        literals: the template's own text between the contents.
        starts: where each of these texts starts in the layout.
        layout: of the conversation with marks in place of contents.
    """

    literals: Literals
    starts: tuple[int, ...]
    layout: Layout


def shape_of(
    renderer: Renderer, roles: Sequence[str], bounded: Sequence[bool], ends: Ends
) -> Shape | None:
    """Return the shape of conversations with these roles; None where they can't share one.

    They can't where the marks can't be laid out, or where the template marks a part of a content
    as generated. Each conversation is then laid out by itself, and an error names its record.
    """
    marked = tuple({"role": role, "content": mark(index)} for index, role in enumerate(roles))
    try:
        rendering = render(renderer, marked)
        layout = lay_out(renderer, rendering, bounded, ends)
    except (TemplateError, RewrittenError):
        return None
    if _marks_parts(layout):
        return None
    literals = literals_between(rendering.text, [True] * len(roles))
    assert literals is not None, roles
    return Shape(literals, _starts(rendering, literals), layout)


def _starts(rendering: Rendering, literals: Literals) -> tuple[int, ...]:
    """Return where each literal starts: after the content before it."""
    ends = [span[1] for number in literals[0] if (span := rendering.contents[number])]
    return (0, *ends)


def _marks_parts(layout: Layout) -> bool:
    """Return whether the text of an answer begins or ends inside a content."""
    bounds = [at for answer in layout.answers for span in answer.text for at in span]
    return any(a < at < b for at in bounds for a, b in filter(None, layout.rendering.contents))


def transferred(shape: Shape, rendering: Rendering) -> Layout:
    """Return a shape's layout, moved to the places of a conversation's own contents.

    Answers begin and end in the template's text, never inside a content.
    """
    here = _starts(rendering, shape.literals)
    *pieces, last = shape.literals[1]
    pieces.append(last + shape.layout.appended)

    def moved(span: Span) -> Span:
        start, end = (
            next(
                new + at - old
                for old, new, piece in zip(shape.starts, here, pieces, strict=True)
                if old <= at <= old + len(piece)
            )
            for at in span
        )
        return start, end

    answers = tuple(
        Answer(answer.turn, tuple(map(moved, answer.text)), tuple(map(moved, answer.end)))
        for answer in shape.layout.answers
    )
    return Layout(rendering, answers, shape.layout.appended, shape.layout.notes)

"""Read the content of a message: its text, its parts with and without loss, its reasoning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from attnimg.train.data.records import Place, Span, bad_record, require_text, shorten

# Flags of a message or of a part of its content: whether it is trained.
FLAGS = ("train", "training", "weight")

# Tags around the reasoning in a content, and around the answer after it.
# Source: axolotl 0.19.0, prompt_strategies/chat_template.py, transform_message (2026-11-27)
_THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
_ANSWER_TAGS = ("<|begin_of_solution|>", "<|end_of_solution|>")


def read_content(
    value: object, name: str, place: Place, *, optional: bool
) -> tuple[str | None, tuple[tuple[int, int], ...]]:
    """Return a content's text and its untrained spans; a list of text parts is joined."""
    if value is None and optional:
        return None, ()
    if not isinstance(value, list):
        return require_text(value, name, place), ()
    pieces, untrained, at = list[str](), list[tuple[int, int]](), 0
    for part in value:
        if not isinstance(part, Mapping) or part.get("type") not in (None, "text"):
            why = f"a part of {name} is {shorten(part)}, needed text"
            do = 'write it as {"type": "text", "text": "..."}, or remove the record; only text is '
            raise bad_record(place, why=why, do=f"{do}supported")
        found = next((part[k] for k in ("text", "content", "value") if part.get(k)), "")
        pieces.append(require_text(found, f"a part of {name}", place))
        if read_flag(part, f"a part of {name}", place) is False:
            untrained.append((at, at + len(found)))
        at += len(found)
    return "".join(pieces), tuple(untrained)


def read_trained_parts(
    value: object, content: str, what: str, place: Place
) -> tuple[Span, ...] | None:
    """Return the character spans that a record marks as trained; None for an empty list.

    Its end offsets are inclusive.

    Source: axolotl 0.19.0, prompt_strategies/chat_template.py, _convert_content_parts (2026-11-27)
    """
    found = {True: list[Span](), False: list[Span]()}
    for part in value if isinstance(value, list) else [value]:
        part = part if isinstance(part, Mapping) else {}
        begin, end, trains = (part.get(key) for key in ("begin_offset", "end_offset", "train"))
        if type(begin) is not int or type(end) is not int or not isinstance(trains, bool):
            why = f"{what} is {shorten(value)}, needed begin_offset, end_offset and train"
            raise bad_record(place, why=why, do="write it as a list of such objects, or remove it")
        if not 0 <= begin <= end < len(content):
            why = f"{what} has offsets {begin} to {end}, needed 0 to {len(content) - 1}"
            raise bad_record(place, why=why, do="correct the offsets; both characters are included")
        found[trains].append((begin, end + 1))
    for a, b in found[True]:
        if any(a < end and begin < b for begin, end in found[False]):
            why = f"{what} has a character that is trained and not trained"
            raise bad_record(place, why=why, do="correct the offsets, so that no parts overlap")
    return tuple(found[True]) if value else None


def split_thinking(content: str, place: Place, *, number: int) -> tuple[str, str]:
    """Return the reasoning in the tags of an answer, and the answer without it.

    Source: axolotl 0.19.0, prompt_strategies/chat_template.py, transform_message (2026-11-27)
    """
    for opening, closing in _THINKING_TAGS:
        if opening not in content or closing not in content:
            continue
        before, _, rest = content.partition(opening)
        reasoning, closed, answer = rest.partition(closing)
        outside = before.strip() or (not closed and closing)
        answer = answer.lstrip()
        opened, ended = _ANSWER_TAGS
        if opened in answer and ended in answer:
            start, _, rest = answer.partition(opened)
            answer, closed, after = rest.partition(ended)
            outside = outside or start.strip() or after.strip() or (not closed and ended)
            answer = answer.strip()
        if outside:
            why = f"message {number} has text outside of its tags: {shorten(outside)}"
            do = f"move it into the answer, or remove {place.key}.split_thinking"
            raise bad_record(place, why=why, do=do)
        return reasoning.strip(), answer
    return "", content


def read_flag(
    holder: Mapping[str, Any], what: str, place: Place, keys: Iterable[str] = FLAGS
) -> bool | None:
    """Return whether a record's flags include it in the loss; None if they do not decide.

    A weight of 1 does not decide: OpenAI's format allows it on any message, and trains only
    answers.
    Source: platform.openai.com/docs/guides/supervised-fine-tuning, "weight" (2026-11-26)
    """
    found = dict[str, bool]()
    for key in keys:
        value = holder.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            why = f"{key} of {what} is {shorten(value)}, needed 0 or 1 (false or true)"
            do = "write 0 or 1; other weights of the loss are not supported"
            raise bad_record(place, why=why, do=do)
        found[key] = bool(value)
    if len(set(found.values())) > 1:
        why = f"{', '.join(found)} of {what} contradict each other"
        do = "keep one of the flags"
        raise bad_record(place, why=why, do=do)
    if False in found.values():
        return False
    return True if found.keys() - {"weight"} else None

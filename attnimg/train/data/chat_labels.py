"""Label the tokens of a rendered conversation by the characters that they have."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from attnimg.train.data.records import IGNORE_INDEX, Span


def with_full_offsets(tokenizer: Any) -> Any:
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


def label_parts(
    ids: list[int],
    labels: list[int],
    offsets: Sequence[Span],
    *,
    content: Span,
    parts: Sequence[Span],
) -> None:
    """Set the labels of a content's tokens: those of its trained parts have loss, no others.

    A token belongs to a part if the part has all of its characters, or at least two of them (the
    last one, or the first one, alone is too little). A token reaches to the start of the next one.
    Source: axolotl 0.19.0, prompt_strategies/chat_template.py, adjust_train_details (2026-11-27)
    """
    first, limit = content
    tokens = [i for i, (start, end) in enumerate(offsets) if start < limit and end > first]
    starts = [max(offsets[i][0], first) for i in tokens]
    lasts = [start - 1 for start in (*starts[1:], limit)]
    for index in tokens:
        labels[index] = IGNORE_INDEX
    for begin, after in parts:
        low = next((n for n, start in enumerate(starts) if start >= begin), len(tokens))
        if low and lasts[low - 1] > begin:
            low -= 1
        high = next((n for n in reversed(range(len(tokens))) if lasts[n] <= after - 1), -1)
        if high + 1 < len(tokens) and starts[high + 1] < after - 1:
            high += 1
        if low > high:
            continue
        for index, start, last in zip(tokens, starts, lasts, strict=True):
            if start >= starts[low] and last <= lasts[high]:
                labels[index] = ids[index]

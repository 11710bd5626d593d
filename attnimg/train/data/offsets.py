"""Label the tokens of a text by the characters that they cover."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from attnimg.train.data.chat_render import Span
from attnimg.train.data.documents import IGNORED


def with_whole_offsets(tokenizer: Any) -> Any:
    """Return a tokenizer with the same ids, whose offsets cover all characters of a token.

    Byte-level tokenizers leave blanks out of the offsets (trim_offsets). A token of a newline and a
    blank then covers the newline alone, and the blank of the answer is not found.
    """
    from tokenizers import Tokenizer, models

    holder = Tokenizer(models.BPE())
    holder.post_processor = tokenizer.backend_tokenizer.post_processor
    written = json.loads(holder.to_str())
    if not _untrim(written["post_processor"]):
        return tokenizer
    whole = copy.deepcopy(tokenizer)  # the run's own is saved beside the model
    whole.backend_tokenizer.post_processor = Tokenizer.from_str(json.dumps(written)).post_processor
    return whole


def _untrim(processor: dict[str, Any] | None) -> bool:
    """Turn trim_offsets off, also in a sequence of processors; return whether it was on."""
    if processor is None:
        return False
    trims = any([_untrim(part) for part in processor.get("processors", ())])
    if processor.get("trim_offsets"):
        processor["trim_offsets"] = False
        return True
    return trims


def label(
    ids: list[int],
    text: str,
    offsets: Sequence[Span],
    *,
    trained: Sequence[Span],
    masked: Sequence[Span] = (),
) -> list[int]:
    """Return labels: the ids of tokens that cover a character of a trained span, IGNORED elsewhere.

    Blanks between two tokens count to the second one, since tokenizers may leave them out of its
    offsets. Other characters between two tokens were removed by a normalizer (an accent, a
    zero-width space), and belong to neither. A token that shares only blanks with a span is not in
    it, unless the token has no other characters: the first token of an answer may begin with the
    blank before the answer.
    """
    spans = [(*span, True) for span in trained] + [(*span, False) for span in masked]
    spans.sort(key=lambda span: (span[0], not span[2]))
    labels, reached, first = [IGNORED] * len(ids), 0, 0
    for index, (start, end) in enumerate(offsets):
        # A blank that the tokenizer inserts may have offsets after those of the next token.
        removed = len(text[reached:start].rstrip()) if start < end else 0
        low, high = min(start, reached + removed), max(end, reached)
        reached = high
        while first < len(spans) and spans[first][1] <= low:
            first += 1
        for a, b, counts in spans[first:]:
            if a >= high:
                break
            inside = text[max(a, low) : min(b, high)]
            if inside and (inside.strip() or not text[low:high].strip()):
                labels[index] = ids[index] if counts else IGNORED
    return labels

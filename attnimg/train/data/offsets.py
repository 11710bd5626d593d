"""Label the tokens of a text by the characters that they show."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from attnimg.train.data.chat_render import Span
from attnimg.train.data.documents import IGNORED


def with_whole_offsets(tokenizer: Any) -> Any:
    """Return a tokenizer whose offsets cover all of a token; ids are those of the given one.

    Byte-level tokenizers trim blanks off the offsets (trim_offsets). Of a token of a newline and a
    blank the newline remains, so that nobody can see that the blank was the answer's.
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
    """Turn trim_offsets off, in a sequence of processors too; return whether it was on."""
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
    """Label the tokens that show a character of a trained span.

    A token reaches back over blanks to the end of the one before it: tokenizers may leave blanks
    out of the offsets, yet the token holds them. Other characters between two tokens are those that
    a normalizer removed (an accent, a zero-width space), and belong to neither. Blanks alone make
    no token part of a span, unless it holds nothing else: the one that opens an answer may begin at
    the blank before it.
    """
    spans = [(*span, True) for span in trained] + [(*span, False) for span in masked]
    spans.sort(key=lambda span: (span[0], not span[2]))
    labels, reached, first = [IGNORED] * len(ids), 0, 0
    for index, (start, end) in enumerate(offsets):
        # A blank that the tokenizer itself inserts may have offsets behind the next token's.
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

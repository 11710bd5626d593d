"""Format one document of a run with its trained tokens marked, before the first step."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from attnimg.train.data.documents import IGNORED, Documents

SHOWN_TOKENS = 400  # of a long document, to fit on a screen


def sample_text(documents: Documents, tokenizer: Any) -> str:
    """Return the first document's text, with >>> and <<< around what carries loss.

    The text begins a little before the first token with loss; control characters are
    written as escapes, so that data can't steer a terminal.
    """
    row = documents.train[0]
    ids, labels = row["input_ids"], row["labels"]
    first = next((index for index, label in enumerate(labels) if label != IGNORED), 0)
    start = max(0, min(first - SHOWN_TOKENS // 4, len(ids) - SHOWN_TOKENS))
    shown = list(zip(ids, labels, strict=True))[start : start + SHOWN_TOKENS]
    pieces = []
    for trained, group in groupby(shown, key=lambda pair: pair[1] != IGNORED):
        text = _printable(tokenizer.decode([token for token, _ in group]))
        pieces.append(f">>>{text}<<<" if trained else text)
    before = "... " if start else ""
    after = " ..." if start + SHOWN_TOKENS < len(ids) else ""
    text = f"{before}{''.join(pieces)}{after}".replace("\n", "\n    ")
    return f"first document (tokens with loss are between >>> and <<<):\n    {text}"


def _printable(text: str) -> str:
    return "".join(
        letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text
    )

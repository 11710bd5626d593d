"""What the data step hands on: documents of tokens, and how many became of what."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from attnimg.train.data.chat_render import Span

if TYPE_CHECKING:
    from datasets import Dataset
IGNORED = -100  # the label of a token without loss (torch's cross_entropy, ignore_index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """What became of one entry of `datasets` or `test_datasets`.

    Attributes:
        key: the config key, "datasets[0]".
        path: what the config names.
        type: how its records became text.
        records: records read.
        documents: documents kept.
        tokens: tokens in them.
        trained_tokens: those that carry loss; a document's first token never does.
        empty: records dropped because they hold no text.
        too_long: records dropped because they exceed sequence_len.
        split: records cut into several documents.
        truncated: records cut off at sequence_len.
        without_loss: documents dropped because no token of theirs carries loss.
        longest: tokens of the longest record, before any limit.
        sequence_len: the longest document allowed, in tokens.
        content: SHA-256 of the documents' tokens and labels, in order.
        read: SHA-256 of the records, before a template writes them.
        reused: whether the documents were found in dataset_prepared_path.
    """

    key: str
    path: str
    type: str
    records: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    empty: int = 0
    too_long: int = 0
    split: int = 0
    truncated: int = 0
    without_loss: int = 0
    longest: int = 0
    sequence_len: int = 0
    content: str = ""
    read: str = ""
    reused: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Documents:
    """Everything to train on, tokenized; rows are documents of 1 to sequence_len tokens.

    Attributes:
        train: columns input_ids and labels, both list[int32] of equal length.
        validation: the same, None without val_set_size and test_datasets.
        figures: one a source, in the order of the config, test_datasets last.
        warnings: sentences on what a person should know before training.
    """

    train: Dataset
    validation: Dataset | None
    figures: tuple[SourceFigures, ...]
    warnings: tuple[str, ...] = ()


def sentence(figures: SourceFigures) -> str:
    """Return in one line what became of a source, naming only what happened."""
    parts = [f"{figures.records:,} records -> {figures.documents:,} documents"]
    longer = f"longer than {figures.sequence_len:,} tokens"
    for count, what in (
        (figures.empty, "empty ones dropped"),
        (figures.too_long, f"{longer} dropped"),
        (figures.split, f"{longer} split"),
        (figures.truncated, f"{longer} truncated"),
        (figures.without_loss, "without any trained token dropped"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    share = figures.trained_tokens / max(1, figures.tokens)
    parts.append(f"{figures.tokens:,} tokens, {share:.0%} with loss")
    reused = " (prepared earlier, reused)" if figures.reused else ""
    return f"{figures.path}: {', '.join(parts)}{reused}"


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

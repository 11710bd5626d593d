"""Define the results of data loading: parsed records, documents, and statistics of each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and its completion; without a prompt, all of the text is trained on.

    Attributes:
        prompt: the text before the completion; None for plain text.
        completion: the text to train on.
        unused: the record's columns that have no effect, for types that read several columns.
    """

    prompt: str | None
    completion: str
    unused: tuple[str, ...] = field(default=(), repr=False)  # not part of the data's hash


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: the role, as the chat template names it.
        content: the text; None where the record has none, as beside tool calls.
        extra: the message's other keys, such as reasoning_content and tool_calls.
        train: whether it carries loss, by the record's flag; None: the role decides.
        untrained: character spans of the content that carry no loss.
    """

    role: str
    content: str | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    train: bool | None = None
    untrained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """The content of a record of the type chat_template.

    Attributes:
        turns: the messages.
        tools: JSON schemas of the functions that the assistant may call.
        unused: the record's columns that have no effect.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


Parsed = Pair | Conversation


def unused_note(what: str, names: Sequence[str]) -> str:
    """Return the warning on names of a kind ("columns") that have no effect."""
    return f"these {what} have no effect: {', '.join(names)}"


SHOWN_TOKENS = 400  # of a long document, to fit on a screen
IGNORED = -100  # the label of a token without loss (torch's cross_entropy, ignore_index)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """Statistics of one entry of `datasets` or `test_datasets`.

    Attributes:
        key: the config key, "datasets[0]".
        path: the path or name in the config.
        type: the dataset type, which decides how records become text.
        records: records read.
        documents: documents kept.
        tokens: tokens in them.
        trained_tokens: those that carry loss; a document's first token never does.
        empty: records dropped because they hold no text.
        too_long: records dropped because they exceed sequence_len.
        split: records cut into several documents.
        truncated: records cut off at sequence_len.
        without_loss: documents dropped because none of their tokens carries loss.
        longest: tokens of the longest record, before any cut.
        sequence_len: the longest document allowed, in tokens.
        content: SHA-256 of the documents' tokens and labels, in order.
        read: SHA-256 of the records, before a template renders them.
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
        validation: the same columns; None without val_set_size and test_datasets.
        figures: statistics of each source, in the order of the config, test_datasets last.
        warnings: warnings for the user before training.
    """

    train: Dataset
    validation: Dataset | None
    figures: tuple[SourceFigures, ...]
    warnings: tuple[str, ...] = ()


def sentence(figures: SourceFigures) -> str:
    """Return the statistics of a source in one line, without those that are 0."""
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


def sample_text(documents: Documents, tokenizer: Any) -> str:
    """Return the first document's text, with >>> and <<< around the tokens that carry loss.

    The text begins a little before the first token with loss. Control characters are escaped, so
    that data can't send commands to a terminal.
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

"""Choose samples of prepared data, and turn their tokens into readable text.

A sample is a document with its tokens and its source; a sampled row has all its documents. The
texts are not trusted: they may have control characters, markup and any script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from attnimg.config.schema import Config, dataset_entries, is_text
from attnimg.train.data import SourceFigures
from attnimg.train.data.records import IGNORE_INDEX
from attnimg.train.preprocess import Preprocessed, Split

SplitName = Literal["training", "evaluation"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a sample.

    Attributes:
        position: its place in the document, from 0.
        id: its id.
        piece: its entry in the vocabulary, such as "Ġthe" or "<0xF0>".
        text: what it adds to the decoded text; "" for the first bytes of a character.
        raw: those bytes; b"" if the text is complete.
        trained: whether it has loss.
        special: whether it is a special token.
    """

    position: int
    id: int
    piece: str
    text: str
    raw: bytes
    trained: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Omitted:
    """Tokens in the middle of a long document that are not shown."""

    tokens: int
    trained: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A document.

    Attributes:
        source: the statistics of the dataset entry that it comes from.
        split: whether it is for training or for evaluation.
        place: the file and the record, "train.jsonl, line 3".
        tokens: its tokens; the middle of a long one is omitted.
        length: tokens of the whole document.
        trained: number of tokens with loss.
        note: what looks wrong about it; "" for nothing.
    """

    source: SourceFigures
    split: SplitName
    place: str
    tokens: tuple[Token | Omitted, ...]
    length: int
    trained: int
    note: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """A row with several documents, none of which can attend to another.

    Attributes:
        number: the number of the row, from 1.
        rows: rows of the split.
        capacity: number of tokens that fit.
        documents: its documents, in their order.
    """

    number: int
    rows: int
    capacity: int
    documents: tuple[Sample, ...]


def choose_samples(
    prepared: Preprocessed, count: int, *, seed: int, limit: int | None
) -> list[Sample]:
    """Choose random documents of each dataset entry, separately for training and evaluation.

    Args:
        prepared: the prepared data.
        count: number of documents of each entry, if it has as many.
        seed: of the choice; the same seed gives the same samples.
        limit: tokens that are shown of a document; None for all.
    """
    import numpy

    random = numpy.random.default_rng(seed)
    found = list[Sample]()
    for name, split in _splits(prepared):
        sources = split.places.with_format("numpy")["source"][:]
        for number in range(len(prepared.documents.figures)):
            (own,) = numpy.nonzero(sources == number)
            chosen = random.choice(own, size=min(count, len(own)), replace=False)
            for index in sorted(chosen):
                found += _samples(prepared, name, split, int(index), limit=limit)
    return found


def choose_row(prepared: Preprocessed, *, seed: int, limit: int | None) -> SampledRow | None:
    """Choose a random packed row of the training data; None if nothing is packed.

    Args:
        prepared: the prepared data.
        seed: of the choice.
        limit: tokens that are shown of each document; None for all.
    """
    import numpy

    rows = prepared.train.rows
    if rows is None:
        return None
    sizes = numpy.diff(rows.offsets)
    several = numpy.nonzero(sizes > 1)[0] if (sizes > 1).any() else numpy.arange(rows.count)
    # Another seed than for the samples, which would choose the same documents again.
    number = int(numpy.random.default_rng([seed, 1]).choice(several))
    first, last = rows.offsets[number], rows.offsets[number + 1]
    return SampledRow(
        number=number + 1,
        rows=rows.count,
        capacity=rows.capacity,
        documents=tuple(
            sample
            for index in rows.documents[first:last]
            for sample in _samples(prepared, "training", prepared.train, int(index), limit=limit)
        ),
    )


def _splits(prepared: Preprocessed) -> Iterator[tuple[SplitName, Split]]:
    yield "training", prepared.train
    if prepared.evaluation is not None:
        yield "evaluation", prepared.evaluation


def _samples(
    prepared: Preprocessed, name: SplitName, split: Split, index: int, *, limit: int | None
) -> Iterator[Sample]:
    """Yield a document; of preference data, the prompt with each answer."""
    row, place = split.documents[index], split.places[index]
    source = prepared.documents.figures[place["source"]]
    for suffix, ids, labels in _sequences(row):
        # A document's first token has no context to predict it from.
        trained = [False, *(label != IGNORE_INDEX for label in labels[1:])]
        yield Sample(
            source=source,
            split=name,
            place=f"{place['place']}{suffix}",
            tokens=tuple(_tokens(ids, trained, prepared.tokenizer, limit=limit)),
            length=len(trained),
            trained=sum(trained),
            note=_note(prepared.config, source, trained),
        )


def _sequences(row: dict[str, Any]) -> Iterator[tuple[str, list[int], list[int]]]:
    """Yield what follows the place of each sequence of a row, its tokens and its labels."""
    if "parts" not in row:
        yield "", row["input_ids"], row["labels"]
        return
    from attnimg.train.preferences.data import split_row

    found = split_row(row)
    names = ("chosen", "rejected")
    if found.desirable is not None:
        names = ("desirable" if found.desirable else "undesirable", "")
    masked = [IGNORE_INDEX] * len(found.prompt)
    for answer, suffix in zip(found.answers, names, strict=False):
        yield f", {suffix}", found.prompt + answer, masked + answer


def _note(config: Config, source: SourceFigures, trained: Sequence[bool]) -> str:
    """Return what looks wrong about the labels of a document; "" for nothing."""
    spec = next(spec for key, spec, _ in dataset_entries(config) if key == source.key)
    if all(trained[1:]) and spec.type and not is_text(spec) and not config.train_on_inputs:
        return (
            f"every token has loss, but with type {source.type} and train_on_inputs: false the "
            "prompt should have none"
        )
    return ""


def _tokens(
    ids: Sequence[int], trained: Sequence[bool], tokenizer: Any, *, limit: int | None
) -> Iterator[Token | Omitted]:
    """Yield the tokens of a document; of a long one the first and the last."""
    if limit is None or len(ids) <= limit:
        yield from _read(ids, trained, tokenizer, first=0)
        return
    head, tail = limit - limit // 3, len(ids) - limit // 3
    yield from _read(ids[:head], trained, tokenizer, first=0)
    yield Omitted(tail - head, sum(trained[head:tail]))
    yield from _read(ids[tail:], trained, tokenizer, first=tail)


def _read(
    ids: Sequence[int], trained: Sequence[bool], tokenizer: Any, *, first: int
) -> Iterator[Token]:
    specials = _special_ids(tokenizer)
    pieces = [str(piece) for piece in tokenizer.convert_ids_to_tokens(list(ids))]
    texts = token_texts(ids, tokenizer)
    for offset, (number, piece, text) in enumerate(zip(ids, pieces, texts, strict=True)):
        if piece.startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # decoding drops the space at the start of a text
        yield Token(
            position=first + offset,
            id=number,
            piece=piece,
            text=text,
            raw=b"" if text else piece_bytes(piece),
            trained=trained[first + offset],
            special=number in specials,
        )


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    found = set(tokenizer.all_special_ids)
    if isinstance(added, dict):  # mistral-common has a method of this name
        found |= {number for number, token in added.items() if token.special}
    return found


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return what each token adds to the decoded text.

    The last token of a character adds it. Only the tokens since the last whole
    character are decoded again, as in text-generation servers.
    """

    def decode(part: Sequence[int]) -> str:
        return str(
            tokenizer.decode(
                list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    texts, start, whole = [], 0, 0
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:whole]), decode(ids[start:end])
        # U+FFFD stands for bytes that are not yet a character.
        if now.endswith("\ufffd") and end - whole < _LONGEST_CHARACTER:
            texts.append("")
            continue
        texts.append(now.removeprefix(before) if now.startswith(before) else decode(ids[whole:end]))
        start, whole = whole, end
    return texts


# Bytes of the longest character in UTF-8.
_LONGEST_CHARACTER = 4


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a piece of a byte-level vocabulary; b"" for another one."""
    if found := _BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(found[1])
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of_letter = {letter: byte for byte, letter in bytes_to_unicode().items()}
    if all(letter in of_letter for letter in piece):
        return bytes(of_letter[letter] for letter in piece)
    return b""


Mark = Literal["text", "space", "line", "code"]

# The signs for white space; the text also breaks after the sign for a line end.
SPACES = {" ": "\u00b7", "\t": "\u21e5", "\n": "\u21b5", "\r": "\u240d", "\u00a0": "\u237d"}


def visible(text: str) -> Iterator[tuple[Mark, str]]:
    """Yield parts of a text in which nothing is invisible and nothing reorders text.

    Yields:
        "text" as it is; "space" as a sign; "line", the sign of a line's end; "code", U+200B.
    """
    plain = ""
    for letter in text:
        mark = _mark(letter)
        if mark == "text":
            plain += letter
            continue
        if plain:
            yield "text", plain
        plain = ""
        yield mark, SPACES.get(letter) or f"U+{ord(letter):04X}"
    if plain:
        yield "text", plain


def _mark(letter: str) -> Mark:
    if letter == "\n":
        return "line"
    if letter in SPACES:
        return "space"
    # Control and format characters, private ones, surrogates, separators, and unassigned ones.
    return "code" if unicodedata.category(letter)[0] in "CZ" else "text"

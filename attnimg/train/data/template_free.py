"""Encode records without a prompt or a chat template: text segments, and records of tokens.

Nothing is added to them: no start token, no end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnimg.train.data.records import (
    IGNORE_INDEX,
    Parsed,
    Place,
    Segments,
    TokenRecord,
    Tokens,
    bad_record,
    require_column,
    require_text,
    shorten,
    unused_warning,
)

NO_END = (
    "some records of type input_output do not end with the end token {!r}, so the model does not "
    "learn to stop there; write it at the end of their last segment"
)


def parse_segments(record: Mapping[str, Any], place: Place) -> Segments | None:
    """Return the segments of an input_output record; None where it has no text.

    Source: axolotl 0.19.0, prompt_strategies/input_output.py (2026-11-27)

    Raises:
        AttnimgError: the column segments is missing, or is not a list of texts with labels.
    """
    hint = 'write each record as {"segments": [{"label": true, "text": "..."}, ...]}'
    value = require_column(record, "segments", place, needed=("segments",), hint=hint)
    if not isinstance(value, list):
        why = f"segments is {shorten(value)}, needed a list of objects with label and text"
        raise bad_record(place, why=why, do=hint)
    parts = list[tuple[bool, str]]()
    for number, part in enumerate(value, start=1):
        if not isinstance(part, Mapping) or not isinstance(part.get("label"), bool):
            why = f"segment {number} is {shorten(part)}, needed label (true or false) and text"
            raise bad_record(place, why=why, do=hint)
        parts.append((part["label"], require_text(part.get("text"), f"segment {number}", place)))
    unused = tuple(k for k, found in record.items() if k != "segments" and found is not None)
    return Segments(tuple(parts), unused) if any(text for _, text in parts) else None


@dataclass(frozen=True, slots=True)
class SegmentEncoder:
    """Encode each segment on its own, so that its tokens do not depend on its neighbours.

    Attributes:
        tokenizer: a transformers tokenizer.
        train_on_inputs: whether segments with the label false are trained too.
        warnings: for the user, on the records encoded so far.
    """

    tokenizer: Any
    train_on_inputs: bool
    warnings: dict[str, None] = field(default_factory=dict)

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Encode records to input_ids and labels."""
        encoded = list[Tokens]()
        for _, parsed in batch:
            assert isinstance(parsed, Segments)
            ids, labels = list[int](), list[int]()
            for trained, text in parsed.parts:
                tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                ids += tokens
                keeps = trained or self.train_on_inputs
                labels += tokens if keeps else [IGNORE_INDEX] * len(tokens)
            encoded.append((ids, labels))
            if parsed.unused:
                self.warnings[unused_warning("columns", parsed.unused)] = None
            if ids and ids[-1] != self.tokenizer.eos_token_id:
                self.warnings[NO_END.format(self.tokenizer.eos_token)] = None
        return encoded


def parse_tokens(record: Mapping[str, Any], place: Place) -> TokenRecord | None:
    """Return a record that is tokenized already; None where it is empty.

    Source: axolotl 0.19.0, utils/data/wrappers.py, _is_dataset_already_tokenized (2026-11-27)

    Raises:
        AttnimgError: input_ids or labels are missing, differ in length, or mask a token.
    """
    needed = ("input_ids", "labels")
    hint = f"set {place.key}.type, or write input_ids and labels of each record"
    found = dict[str, Sequence[int]]()
    for name in needed:
        value = require_column(record, name, place, needed=needed, hint=hint)
        if not isinstance(value, list) or any(type(number) is not int for number in value):
            why = f"{name} is {shorten(value)}, needed a list of whole numbers"
            raise bad_record(place, why=why, do="tokenize the record again")
        found[name] = value
    ids, labels = found["input_ids"], found["labels"]
    if len(ids) != len(labels):
        why = f"found {len(ids):,} input_ids and {len(labels):,} labels, needed one for each token"
        raise bad_record(place, why=why, do="tokenize the record again")
    mask = record.get("attention_mask")
    if mask is not None and mask != [1] * len(ids):
        why = "attention_mask has values other than 1, or another length than input_ids"
        do = "remove padding from the records, or tokenize the record again"
        raise bad_record(place, why=why, do=do)
    unused = tuple(
        key
        for key, value in record.items()
        if key not in (*needed, "attention_mask") and value is not None
    )
    return TokenRecord(tuple(ids), tuple(labels), unused) if ids else None


@dataclass(frozen=True, slots=True)
class TokenEncoder:
    """Check that tokens are in the vocabulary; return them unchanged.

    Attributes:
        vocabulary: the number of tokens.
        warnings: for the user, on the records encoded so far.
    """

    vocabulary: int
    warnings: dict[str, None] = field(default_factory=dict)

    def __call__(self, batch: Sequence[tuple[Place, Parsed]]) -> list[Tokens]:
        """Return input_ids and labels.

        Raises:
            AttnimgError: a token is not in the vocabulary.
        """
        for place, parsed in batch:
            assert isinstance(parsed, TokenRecord)
            used = (*parsed.ids, *(label for label in parsed.labels if label != IGNORE_INDEX))
            wrong = next((token for token in used if not 0 <= token < self.vocabulary), None)
            if wrong is not None:
                why = f"found the token {wrong:,}, needed 0 to {self.vocabulary - 1:,}"
                do = "tokenize the records with the tokenizer of this run"
                raise bad_record(place, why=why, do=do)
            if parsed.unused:
                self.warnings[unused_warning("columns", parsed.unused)] = None
        return [
            (list(parsed.ids), list(parsed.labels))
            for _, parsed in batch
            if isinstance(parsed, TokenRecord)
        ]

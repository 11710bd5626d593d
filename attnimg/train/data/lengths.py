"""Keep documents within sequence_len: drop, split, truncate or refuse the longer ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from attnimg.config.schema import Config, is_text
from attnimg.errors import AttnimgError
from attnimg.train.data.documents import IGNORED
from attnimg.train.data.records import Place
from attnimg.train.data.sources import Source
from attnimg.train.data.tokens import Tokens

Strategy = Literal["drop", "split", "truncate", "raise"]


@dataclass(slots=True)
class Tally:
    """Running counts of one source; see SourceFigures for what each means."""

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


def strategy_for(source: Source, config: Config) -> Strategy:
    """Choose what happens to long documents; running text loses nothing when it is split."""
    if config.excess_length_strategy is not None:
        return config.excess_length_strategy
    return "split" if is_text(source.spec) else "drop"


def fit(
    encoded: Iterable[tuple[Place, Tokens]], tally: Tally, *, strategy: Strategy, sequence_len: int
) -> Iterator[Tokens]:
    """Yield documents of 1 to sequence_len tokens that carry loss; count all others.

    Raises:
        AttnimgError: a document is longer and the strategy is "raise".
    """
    for place, (ids, labels) in encoded:
        tally.longest = max(tally.longest, len(ids))
        pieces = [(ids, labels)]
        if len(ids) > sequence_len:
            if strategy == "raise":
                raise _too_long(place, len(ids), sequence_len=sequence_len)
            if strategy == "drop":
                tally.too_long += 1
                continue
            starts = range(0, len(ids) if strategy == "split" else 1, sequence_len)
            pieces = [(ids[i : i + sequence_len], labels[i : i + sequence_len]) for i in starts]
            tally.split += strategy == "split"
            tally.truncated += strategy == "truncate"
        for piece in pieces:
            # Nothing comes before a document's first token, so it can't be predicted.
            trained = sum(label != IGNORED for label in piece[1][1:])
            if not trained:
                tally.without_loss += 1
                continue
            tally.documents += 1
            tally.tokens += len(piece[0])
            tally.trained_tokens += trained
            yield piece


def _too_long(place: Place, tokens: int, *, sequence_len: int) -> AttnimgError:
    return AttnimgError(
        f"too long: {place}",
        why=f"found {tokens:,} tokens, at most sequence_len {sequence_len:,} are allowed with "
        "excess_length_strategy: raise",
        do=f"set sequence_len: {tokens}, or excess_length_strategy: split or truncate or drop",
        code="bad-data",
        key=f"{place.key}.path",
    )

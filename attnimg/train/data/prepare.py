"""Prepare the documents of one source: read, parse, encode and cut its records, batch by batch."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, Literal, cast

from attnimg.config.schema import Config, is_text
from attnimg.train.data.documents import IGNORED, Parsed, SourceFigures
from attnimg.train.data.records import Place, Record, bad_file, read_records
from attnimg.train.data.sources import Source, load_hub, load_saved
from attnimg.train.data.splits import asked_split, find_rows, split_names
from attnimg.train.data.types import Encoder, Tokens, encoder_for, record_parser

if TYPE_CHECKING:
    import pyarrow

BATCH_RECORDS = 256

Batch = list[tuple[Place, Parsed]]

Encoded = tuple[list[Tokens], tuple[str, ...]]  # a batch's tokens, and the encoder's warnings

Strategy = Literal["drop", "split", "truncate", "raise"]  # how to treat long documents

# The encoder in a worker process: it is sent once, instead of with every batch.
_encoders: list[Encoder] = []


def prepare(
    source: Source,
    config: Config,
    tokenizer: Any,
    *,
    write: Callable[[pyarrow.RecordBatch], None],
    advance: Callable[[int], None],
) -> tuple[SourceFigures, tuple[str, ...]]:
    """Write the documents of one source, batch by batch; return its figures and warnings.

    Args:
        source: the source to read.
        config: sequence_len, strategy, loss on inputs, number of processes.
        tokenizer: a transformers tokenizer.
        write: called with each batch of documents, in the order of the records.
        advance: called with the number of records read since the last call.

    Raises:
        AttnimgError: a record does not fit its type, or the template can't be used.
    """
    import pyarrow

    tally, warnings = Counter[str](), dict[str, None]()
    content, read = hashlib.sha256(), hashlib.sha256()
    batches = _parsed_batches(source, tally, advance)
    processes = config.dataset_num_proc or config.dataset_processes or 1
    encoder = encoder_for(source, config, tokenizer)
    for batch, (tokens, found) in _encoded(batches, encoder, processes=processes):
        warnings |= dict.fromkeys(found)
        for _, value in batch:
            read.update(repr(value).encode("utf-8", "surrogatepass"))
        places = (place for place, _ in batch)
        documents = list(
            _fit(
                zip(places, tokens, strict=True),
                tally,
                strategy=strategy_for(source, config),
                sequence_len=config.sequence_len,
            )
        )
        for row in (row for document in documents for row in document):
            content.update(len(row).to_bytes(8, "little") + array("i", row).tobytes())
        columns = {
            "input_ids": [ids for ids, _ in documents],
            "labels": [labels for _, labels in documents],
        }
        write(pyarrow.RecordBatch.from_pydict(columns, schema=schema()))
    figures = SourceFigures(
        key=source.key,
        path=source.spec.path,
        type=source.spec.type or "",
        sequence_len=config.sequence_len,
        content=content.hexdigest(),
        read=read.hexdigest(),
        **cast("dict[str, Any]", tally),
    )
    return figures, tuple(warnings)


def schema() -> pyarrow.Schema:
    """Return the columns of documents: input_ids and labels, list<int32>."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema([("input_ids", ids), ("labels", ids)])


def strategy_for(source: Source, config: Config) -> Strategy:
    """Return how long documents are treated; by default, plain text is split without loss."""
    if config.excess_length_strategy is not None:
        return config.excess_length_strategy
    return "split" if is_text(source.spec) else "drop"


def read_source(source: Source) -> Iterator[Record]:
    """Yield the records of a source in order, each with its place.

    Raises:
        AttnimgError: the data are missing or broken, or the split does not exist.
    """
    if source.kind == "files":
        yield from _read_files(source)
        return
    loaded = load_hub(source) if source.kind == "hub" else load_saved(source)
    spec, key = source.spec, source.key
    first = True
    for name, start, stop in find_rows(spec, {n: len(s) for n, s in loaded.items()}, key=key):
        rows = loaded[name].select(range(start, stop))
        for number, record in enumerate(rows, start=start + 1):
            yield Place(spec.path, number, "record", key, first), record
            first = False


def _read_files(source: Source) -> Iterator[Record]:
    """Yield the rows of the split; files are read twice if it is a part of them (to count rows)."""
    spec, key, lengths = source.spec, source.key, dict.fromkeys(source.splits, 0)

    def read(split: str) -> Iterator[Record]:
        for file in source.splits[split]:
            yield from read_records(file, key=key)

    names = split_names(spec, lengths, key=key)
    if "[" not in asked_split(spec, lengths, key=key):
        for name in names:
            yield from read(name)
        return
    lengths |= {name: sum(1 for _ in read(name)) for name in names}
    for name, start, stop in find_rows(spec, lengths, key=key):
        yield from islice(read(name), start, stop)


def _parsed_batches(
    source: Source, tally: Counter[str], advance: Callable[[int], None]
) -> Iterator[Batch]:
    """Yield batches of parsed records, and count what was read."""
    parse = record_parser(source.spec)
    stream = read_source(source)
    while records := list(islice(stream, BATCH_RECORDS)):
        tally["records"] += len(records)
        advance(len(records))
        parsed = ((place, parse(record, place)) for place, record in records)
        kept = [(place, value) for place, value in parsed if value is not None]
        tally["empty"] += len(records) - len(kept)
        if kept:
            yield kept


def _encoded(
    batches: Iterable[Batch], encoder: Encoder, *, processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in their order, in this process or in several.

    Few batches are queued at a time, so that a file larger than memory can be prepared. Processes
    are spawned: forking after torch or a tokenizer has started threads can hang.
    """
    if processes == 1:
        for batch in batches:
            yield batch, (encoder(batch), tuple(encoder.notes))
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_set_encoder, initargs=(encoder,)
    ) as pool:
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > 2 * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _set_encoder(encoder: Encoder) -> None:
    _encoders.append(encoder)


def _encode(batch: Batch) -> Encoded:
    return _encoders[0](batch), tuple(_encoders[0].notes)


def _fit(
    encoded: Iterable[tuple[Place, Tokens]],
    tally: Counter[str],
    *,
    strategy: Strategy,
    sequence_len: int,
) -> Iterator[Tokens]:
    """Yield documents of 1 to sequence_len tokens that carry loss; count each in the tally.

    The keys of the tally are fields of SourceFigures.

    Raises:
        AttnimgError: a document is longer and the strategy is "raise".
    """
    for place, (ids, labels) in encoded:
        tally["longest"] = max(tally["longest"], len(ids))
        pieces = [(ids, labels)]
        if len(ids) > sequence_len:
            if strategy == "raise":
                raise bad_file(
                    f"too long: {place}",
                    why=f"found {len(ids):,} tokens, at most sequence_len {sequence_len:,} are "
                    "allowed with excess_length_strategy: raise",
                    do=f"set sequence_len: {len(ids)}, or excess_length_strategy: split or "
                    "truncate or drop",
                    key=place.key,
                )
            if strategy == "drop":
                tally["too_long"] += 1
                continue
            starts = range(0, len(ids) if strategy == "split" else 1, sequence_len)
            pieces = [(ids[i : i + sequence_len], labels[i : i + sequence_len]) for i in starts]
            tally["split"] += strategy == "split"
            tally["truncated"] += strategy == "truncate"
        for piece in pieces:
            # A document's first token has no context to predict it from.
            trained = sum(label != IGNORED for label in piece[1][1:])
            if not trained:
                tally["without_loss"] += 1
                continue
            tally["documents"] += 1
            tally["tokens"] += len(piece[0])
            tally["trained_tokens"] += trained
            yield piece

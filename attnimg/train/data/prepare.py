"""Make the documents of one source: read, parse, tokenize, fit; in batches, in order."""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.train.data.documents import SourceFigures
from attnimg.train.data.lengths import Tally, fit, strategy_for
from attnimg.train.data.parsed import Parsed
from attnimg.train.data.read import read_source
from attnimg.train.data.records import Place
from attnimg.train.data.sources import Source
from attnimg.train.data.tokens import Encoder, Tokens, encoder_for
from attnimg.train.data.types import parser

if TYPE_CHECKING:
    import pyarrow

BATCH_RECORDS = 256
Batch = list[tuple[Place, Parsed]]
Result = tuple[list[Tokens], tuple[str, ...]]  # a batch's tokens, and the encoder's warnings

# The encoder of a worker process, which is sent to it once instead of with every batch.
_encoders: list[Encoder] = []


def schema() -> pyarrow.Schema:
    """Return the columns of documents: input_ids and labels, list<int32>."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema([("input_ids", ids), ("labels", ids)])


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
        source: what to read.
        config: sequence_len, strategy, loss on inputs, number of processes.
        tokenizer: a transformers tokenizer.
        write: takes each batch of documents, in the order of the records.
        advance: told how many more records were read.

    Raises:
        AttnimgError: a record is not what its type says, or the template can't be used.
    """
    import pyarrow

    tally, warnings, content = Tally(), dict[str, None](), hashlib.sha256()
    read = hashlib.sha256()
    batches = _parsed(source, tally, advance)
    processes = config.dataset_num_proc or config.dataset_processes or 1
    encoder = encoder_for(source, config, tokenizer)
    for batch, (tokens, found) in _encoded(batches, encoder, processes=processes):
        warnings |= dict.fromkeys(found)
        for _, value in batch:
            read.update(repr(value).encode("utf-8", "surrogatepass"))
        places = (place for place, _ in batch)
        documents = list(
            fit(
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
        **asdict(tally),
    )
    return figures, tuple(warnings)


def _parsed(source: Source, tally: Tally, advance: Callable[[int], None]) -> Iterator[Batch]:
    parse = parser(source.spec)
    stream = read_source(source)
    while records := list(islice(stream, BATCH_RECORDS)):
        tally.records += len(records)
        advance(len(records))
        parsed = ((place, parse(record, place)) for place, record in records)
        kept = [(place, value) for place, value in parsed if value is not None]
        tally.empty += len(records) - len(kept)
        if kept:
            yield kept


def _encoded(
    batches: Iterable[Batch], encoder: Encoder, *, processes: int
) -> Iterator[tuple[Batch, Result]]:
    """Encode batches in their order, in this process or in several.

    Few batches wait at a time, so that a file larger than memory can be prepared. Processes are
    spawned: forking after torch or a tokenizer has started threads can hang.
    """
    if processes == 1:
        for batch in batches:
            yield batch, (encoder(batch), encoder.warnings)
        return
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_keep, initargs=(encoder,)
    ) as pool:
        waiting: deque[tuple[Batch, Future[Result]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, batch)))
            if len(waiting) > 2 * processes:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _keep(encoder: Encoder) -> None:
    _encoders.append(encoder)


def _encode(batch: Batch) -> Result:
    return _encoders[0](batch), _encoders[0].warnings

"""Read only as many records of a dataset as max_steps needs, in the order of a shuffle buffer.

The documents are tokenized before the first step, as in any other run, so that packing, proofs
and resuming work in the same way. Neither memory nor time depends on the size of the dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from attnimg.config.schema import Config, is_streamed
from attnimg.train.data.records import Record
from attnimg.train.distributed import world_size

# Source: axolotl 0.19.0, utils/schemas/config.py, streaming_multipack_buffer_size (2026-11-27)
BUFFER_RECORDS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamAmount:
    """How much of a stream the run trains on.

    Attributes:
        documents: rows of documents that are not packed; 0 where they are.
        tokens: tokens of packed documents; 0 where they are not.
        buffer: records in the shuffle buffer; 0 to read them in their order.
    """

    documents: int
    tokens: int
    buffer: int

    def is_met(self, tally: Mapping[str, int]) -> bool:
        """Return whether the documents that were read so far are enough."""
        return tally["documents"] >= self.documents and tally["tokens"] >= self.tokens


def need_of(config: Config) -> StreamAmount | None:
    """Return how much of its stream a run needs; None where it reads all records."""
    if not is_streamed(config) or not config.max_steps:
        return None
    rows = config.micro_batch_size * config.gradient_accumulation_steps * world_size()
    rows *= config.max_steps
    packed = bool(config.sample_packing)
    buffer = config.streaming_multipack_buffer_size or BUFFER_RECORDS
    return StreamAmount(
        documents=0 if packed else rows,
        tokens=rows * config.sequence_len if packed else 0,
        buffer=buffer if config.shuffle_merged_datasets else 0,
    )


def shuffle_in_buffer(records: Iterable[Record], *, size: int, seed: int) -> Iterator[Record]:
    """Yield all records from a buffer: a random one is replaced by the next, until none is left."""
    import numpy

    rng = numpy.random.default_rng(seed)
    buffer = list[Record]()
    for record in records:
        if len(buffer) < size:
            buffer.append(record)
            continue
        place = int(rng.integers(size))
        yield buffer[place]
        buffer[place] = record
    for place in rng.permutation(len(buffer)):
        yield buffer[place]

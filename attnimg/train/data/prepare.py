"""Prepare the documents of one source, or load those that an earlier run prepared.

Records are read, parsed, encoded and cut in batches. The documents are kept in memory, or cached in
dataset_prepared_path, so that a second run need not tokenize. There is one folder for each source
and user, named after a hash of all that its documents depend on: the bytes of the data, the
tokenizer, this package's code. It is used only if it is complete and belongs to the user; otherwise
the documents are prepared again, and a warning gives the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import compress, islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from attnimg.config.schema import Config, is_chat, is_text, trains_preferences, type_name
from attnimg.errors import AttnimgError, counted
from attnimg.files import NotPrivate, check_private, read_regular
from attnimg.train.data.chat_mistral import describe_tokenizer
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.records import (
    IGNORE_INDEX,
    Parsed,
    Place,
    Record,
    Tokens,
    bad_file,
)
from attnimg.train.data.sources import Source, read_source
from attnimg.train.data.streams import StreamAmount, shuffle_in_buffer
from attnimg.train.data.types import Encoder, choose_parser, make_encoder

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

BATCH_RECORDS = 256

# Places of dropped and cut records that are kept for each reason.
SHOWN_PLACES = 3

Batch = list[tuple[Place, Parsed]]

Encoded = tuple[list[Tokens], tuple[str, ...]]  # a batch's tokens, and the encoder's warnings

Strategy = Literal["drop", "split", "truncate", "raise"]  # how to treat long documents

# The encoder in a worker process: it is sent once, instead of with every batch.
_encoders: list[Encoder] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFigures:
    """Statistics of one entry of `datasets` or `test_datasets`.

    Attributes:
        key: the config key, "datasets[0]".
        path: the path or name in the config.
        type: the dataset type, which decides how records become text.
        records: records read.
        documents: documents to train or evaluate on.
        tokens: tokens in them.
        trained_tokens: those with loss; a document's first token never has one.
        empty: records dropped because they have no text.
        too_long: records dropped because they exceed sequence_len.
        too_short: documents dropped because they have fewer than min_sample_len tokens.
        split: records cut into several documents.
        truncated: records truncated at sequence_len.
        without_loss: documents dropped because none of their tokens has loss.
        longest: tokens of the longest record, before it is split or truncated.
        sequence_len: the longest document allowed, in tokens.
        content: SHA-256 of the documents' tokens and labels, in order.
        read: SHA-256 of the records, before a template renders them.
        places: name of a count above -> where the first records are that it counts.
        kept: whether the documents are in dataset_prepared_path; those of the hub never are.
        reused: whether an earlier run put them there.
        unit: what one of the documents is called in messages.
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
    too_short: int = 0
    split: int = 0
    truncated: int = 0
    without_loss: int = 0
    longest: int = 0
    sequence_len: int = 0
    content: str = ""
    read: str = ""
    places: Mapping[str, list[str]] = field(default_factory=dict)
    kept: bool = False
    reused: bool = False
    unit: str = "document"


def summary_line(figures: SourceFigures) -> str:
    """Return the statistics of a source in one line, without counts of 0."""
    parts = [f"{counted(figures.records, 'record')} -> {counted(figures.documents, figures.unit)}"]
    longer = f"longer than {counted(figures.sequence_len, 'token')}"
    for count, what in (
        (figures.empty, "empty ones dropped"),
        (figures.too_long, f"{longer} dropped"),
        (figures.too_short, "shorter than min_sample_len dropped"),
        (figures.split, f"{longer} split"),
        (figures.truncated, f"{longer} truncated"),
        (figures.without_loss, "without any trained token dropped"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    share = figures.trained_tokens / max(1, figures.tokens)
    parts.append(f"{counted(figures.tokens, 'token')}, {share:.0%} with loss")
    reused = " (prepared earlier, reused)" if figures.reused else ""
    return f"{figures.path}: {', '.join(parts)}{reused}"


def prepare_source(
    source: Source, config: Config, tokenizer: Any, need: StreamAmount | None, write: Write
) -> tuple[SourceFigures, tuple[str, ...]]:
    """Write the documents of one source, batch by batch; return its figures and warnings.

    Args:
        source: the source to read.
        config: sequence_len, strategy, loss on inputs, number of processes.
        tokenizer: a transformers tokenizer.
        need: how much of the source is read; None for all of it.
        write: called with each batch of documents, in the order of the records.

    Raises:
        AttnimgError: a record does not fit its type, or the template can't be used.
    """
    import pyarrow
    from datasets.utils import tqdm

    tally, warnings = Tally(), dict[str, None]()
    content, read = hashlib.sha256(), hashlib.sha256()
    encoder = make_encoder(source, config, tokenizer)
    # Other processes would read ahead, past what is needed.
    processes = 1 if need else config.dataset_num_proc or config.dataset_processes or 1
    limits = DocumentLimits(
        strategy=strategy_for(source, config),
        sequence_len=config.sequence_len,
        min_sample_len=config.min_sample_len or 1,
    )
    # disable=None: no progress bar where stderr is not a terminal.
    with tqdm(desc=source.spec.path, unit=" records", disable=None, leave=False) as bar:
        batches = _parse_batches(source, tally, bar.update, need, seed=config.seed)
        for batch, (tokens, found) in _encode_batches(batches, encoder, processes=processes):
            warnings |= dict.fromkeys(found)
            for _, value in batch:
                read.update(repr(value).encode("utf-8", "surrogatepass"))
            encoded = zip((place for place, _ in batch), tokens, strict=True)
            documents = list(_cut_documents(encoded, tally, limits))
            for row in (row for _, document in documents for row in document):
                content.update(len(row).to_bytes(8, "little") + array("i", row).tobytes())
            columns = [
                [ids for _, (ids, _) in documents],
                [labels for _, (_, labels) in documents],
                [place for place, _ in documents],
            ]
            write(pyarrow.record_batch(columns, schema=schema()))
            if need and need.is_met(tally):
                break
        else:
            if need:
                warnings[
                    STREAM_ENDED.format(source.spec.path, counted(tally["documents"], "document"))
                ] = None
    figures = SourceFigures(
        key=source.key,
        path=source.spec.path,
        type=type_name(source.spec),
        sequence_len=config.sequence_len,
        content=content.hexdigest(),
        read=read.hexdigest(),
        places=tally.places,
        **cast("dict[str, Any]", tally),
    )
    return figures, tuple(warnings)


STREAM_ENDED = "{} has {}, fewer than max_steps needs: they are trained more than once"


def schema() -> pyarrow.Schema:
    """Return the columns of documents: input_ids and labels, list<int32>, and place, a text."""
    import pyarrow

    ids = pyarrow.list_(pyarrow.int32())
    return pyarrow.schema([("input_ids", ids), ("labels", ids), ("place", pyarrow.string())])


def strategy_for(source: Source, config: Config) -> Strategy:
    """Return what happens to long documents: by default, text is split and others are dropped."""
    if config.excess_length_strategy is not None:
        return config.excess_length_strategy
    return "split" if is_text(source.spec) else "drop"


class Tally(Counter[str]):
    """Counts of a source, by the names of SourceFigures."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, list[str]] = {}

    def add(self, name: str, place: Place) -> None:
        """Count a record, and keep the place of the first ones."""
        self[name] += 1
        places = self.places.setdefault(name, [])
        if len(places) < SHOWN_PLACES and (text := place_text(place)) not in places:
            places.append(text)


def _parse_batches(
    source: Source,
    tally: Tally,
    advance: Callable[[int], object],
    need: StreamAmount | None,
    *,
    seed: int,
) -> Iterator[Batch]:
    """Yield batches of parsed records, and count what was read."""
    parse = choose_parser(source.spec)
    stream = read_shard(source, seed=seed) if need is None else _read_stream(source, need, seed)
    while records := list(islice(stream, BATCH_RECORDS)):
        tally["records"] += len(records)
        advance(len(records))
        nonempty = []
        for place, record in records:
            if (value := parse(record, place)) is not None:
                nonempty.append((place, value))
            else:
                tally.add("empty", place)
        if nonempty:
            yield nonempty


def read_shard(source: Source, *, seed: int) -> Iterator[Record]:
    """Yield the records of a source, or those of its shard, in the order of the files.

    A shard has the same records as with axolotl, which shuffles them before it takes one.
    Source: axolotl 0.19.0, utils/data/sft.py, _load_and_process_single_dataset (2026-11-27)
    """
    import numpy

    shards, index = source.spec.shards or 1, source.spec.shards_idx or 0
    if shards == 1:
        yield from islice(read_source(source), _skipped(source), None)
        return
    total = sum(1 for _ in read_source(source))
    size, longer = divmod(total, shards)
    start = size * index + min(index, longer)
    order = numpy.random.default_rng(seed).permutation(total)
    chosen = numpy.zeros(total, dtype=bool)
    chosen[order[start : start + size + (index < longer)]] = True
    yield from compress(read_source(source), chosen)


def _read_stream(source: Source, need: StreamAmount, seed: int) -> Iterator[Record]:
    """Yield the records of a source, in the order of the shuffle buffer."""
    records = islice(read_source(source, stream=True), _skipped(source), None)
    return shuffle_in_buffer(records, size=need.buffer, seed=seed) if need.buffer else records


def _skipped(source: Source) -> int:
    """Return how many records are left out at the start: only pretraining_dataset has the key."""
    return (source.spec.skip or 0) if source.key.startswith("pretraining_dataset") else 0


def _encode_batches(
    batches: Iterable[Batch], encoder: Encoder, *, processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches in their order, in this process or in several.

    Few batches are queued at a time, so that a file larger than memory can be prepared. Processes
    are spawned: forking after torch or a tokenizer has started threads can hang.
    """
    if processes == 1:
        for batch in batches:
            yield batch, (encoder(batch), tuple(encoder.warnings))
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
    return _encoders[0](batch), tuple(_encoders[0].warnings)


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentLimits:
    """Which documents are kept: how long they may be, and what happens to longer ones."""

    strategy: Strategy
    sequence_len: int
    min_sample_len: int


def _cut_documents(
    encoded: Iterable[tuple[Place, Tokens]], tally: Tally, limits: DocumentLimits
) -> Iterator[tuple[str, Tokens]]:
    """Yield documents of at most sequence_len tokens, some of them with loss; count each.

    Each has a text about where it comes from, "train.jsonl, line 3, part 2 of 4". The keys of the
    tally are fields of SourceFigures.

    Raises:
        AttnimgError: a document is longer and the strategy is "raise".
    """
    strategy, sequence_len = limits.strategy, limits.sequence_len
    for place, (ids, labels) in encoded:
        tally["longest"] = max(tally["longest"], len(ids))
        pieces = [(ids, labels)]
        if len(ids) > sequence_len:
            if strategy == "raise":
                raise bad_file(
                    f"record too long: {place}",
                    why=f"found {len(ids):,} tokens, needed at most sequence_len {sequence_len:,}",
                    do=f"set sequence_len: {len(ids)}, or excess_length_strategy: split or "
                    "truncate or drop",
                    key=place.key,
                )
            if strategy == "drop":
                tally.add("too_long", place)
                continue
            starts = range(0, len(ids) if strategy == "split" else 1, sequence_len)
            pieces = [(ids[i : i + sequence_len], labels[i : i + sequence_len]) for i in starts]
            tally.add("split" if strategy == "split" else "truncated", place)
        for number, piece in enumerate(pieces, start=1):
            if len(piece[0]) < limits.min_sample_len:
                tally.add("too_short", place)
                continue
            # A document's first token has no context to predict it from.
            trained = sum(label != IGNORE_INDEX for label in piece[1][1:])
            if not trained:
                tally.add("without_loss", place)
                continue
            tally["documents"] += 1
            tally["tokens"] += len(piece[0])
            tally["trained_tokens"] += trained
            part = f", part {number} of {len(pieces)}" if len(pieces) > 1 else ""
            yield f"{place_text(place)}{part}", piece


def place_text(place: Place) -> str:
    """Return where a record is, without the folder: cached documents may be those of a copy."""
    named = str(replace(place, file=Path(place.file).name))
    # A file name may have bytes that are not UTF-8.
    return named.encode("utf-8", "backslashreplace").decode("utf-8")


# Packages that the prepared documents depend on, besides this one.
PACKAGES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
DOCUMENTS, FIGURES = "documents.arrow", "figures.json"

# FIGURES has a few numbers, and warnings.
_FIGURES_BYTES = 16 << 20

Write = Callable[["pyarrow.RecordBatch"], object]
Prepared = tuple[SourceFigures, tuple[str, ...]]


class UnusableCache(Exception):
    """Raised for a cached folder that can't be used; the message is the reason."""


def cache_key(source: Source, config: Config, tokenizer: Any, need: StreamAmount | None) -> str:
    """Return a hash of all that a source's documents depend on."""
    paths = [file.path for file in source.files]
    if source.kind == "saved":
        folder = Path(source.spec.path).expanduser()
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = None
    if is_chat(source.spec):
        template = choose_chat_template(config, tokenizer, spec=source.spec, key=source.key)
    here = Path(__file__).parent
    code = sorted(here.glob("*.py"))
    if trains_preferences(config):
        code += sorted((here.parent / "preferences").glob("*.py"))
    facts = {
        "code": [_digest(path) for path in code],
        "rl": config.rl,
        "packages": {name: version(name) for name in PACKAGES},
        "spec": source.spec.model_dump(mode="json"),
        "data": [(path.name, _digest(path)) for path in paths],
        "sequence_len": config.sequence_len,
        "min_sample_len": config.min_sample_len,
        "seed": config.seed if source.spec.shards or need else None,
        "need": asdict(need) if need else None,
        "strategy": strategy_for(source, config),
        "train_on_inputs": config.train_on_inputs,
        "system_message": config.default_system_message,
        "eot_tokens": config.eot_tokens,
        "template": template,
        "template_kwargs": config.chat_template_kwargs,
        # Templates such as Llama 3.1's write the current date.
        "day": str(date.today()) if "strftime_now" in json.dumps(template) else None,
        "tokenizer": describe_tokenizer(tokenizer)
        if config.tokenizer_use_mistral_common
        else backend.to_str()
        if backend is not None
        else tokenizer.get_vocab(),
        "special_tokens": str(tokenizer.special_tokens_map),
    }
    return _text_digest(facts)


def load_source(
    source: Source, config: Config, tokenizer: Any, need: StreamAmount | None
) -> tuple[Dataset, Prepared]:
    """Prepare one source, or load its documents from dataset_prepared_path."""
    make, columns = partial(prepare_source, source, config, tokenizer, need), schema()
    if trains_preferences(config):
        from attnimg.train.preferences.data import preference_schema, prepare_preferences

        make = partial(prepare_preferences, source, config, tokenizer)
        columns = preference_schema()
    # The data of a hub name may change, so only local data are cached.
    if config.dataset_prepared_path and source.kind != "hub":
        root = Path(config.dataset_prepared_path).expanduser()
        return make_on_disk(root, cache_key(source, config, tokenizer, need), make, columns)
    return make_in_memory(make, columns)


def make_in_memory(
    make: Callable[[Write], Prepared], columns: pyarrow.Schema
) -> tuple[Dataset, Prepared]:
    """Prepare documents and return them in memory: 8 bytes per token."""
    import datasets
    import pyarrow

    batches: list[pyarrow.RecordBatch] = []
    figures, warnings = make(batches.append)
    table = datasets.table.InMemoryTable(pyarrow.Table.from_batches(batches, schema=columns))
    return datasets.Dataset(table, fingerprint=figures.content[:16]), (figures, warnings)


def make_on_disk(
    root: Path, key: str, make: Callable[[Write], Prepared], columns: pyarrow.Schema
) -> tuple[Dataset, Prepared]:
    """Return the documents cached under a key, or prepare and cache them; both are memory-mapped.

    Raises:
        AttnimgError: the folder can't be written, or the disk is full.
    """
    # The uid separates the users of a shared folder: none reads files that another user wrote.
    folder = root / f"{key[:32]}-{os.geteuid()}"
    refused = tuple[str, ...]()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked_folder(root, folder.name):
            try:
                if os.path.lexists(folder):
                    return _load_cached(folder, key)
            except UnusableCache as error:
                refused = (f"{folder} is not used: {error}",)
                _remove(folder)
            _write(root, folder, key, make, columns)
            documents, (figures, warnings) = _load_cached(folder, key)
    except (OSError, UnusableCache) as error:
        raise AttnimgError(
            f"cannot write prepared documents to {root}",
            why="\n".join((*refused, str(error))),
            do="remove dataset_prepared_path to prepare the documents in memory, or set it to a "
            "folder of your own with free space",
            code="not-writable",
            key="dataset_prepared_path",
        ) from None
    again = tuple(f"{reason}; it was prepared again" for reason in refused)
    return documents, (replace(figures, reused=False), (*again, *warnings))


@contextmanager
def _locked_folder(root: Path, name: str) -> Iterator[None]:
    """Lock a folder, so that one process of a run prepares it and the others wait and reuse it."""
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        lock = os.open(root / f".lock-{name}", flags, 0o600)
    except OSError:  # a read-only folder may contain the documents already
        yield
        return
    try:
        # Another user could hold the lock forever; some network file systems have no locks.
        if os.fstat(lock).st_uid == os.geteuid():
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in root.glob(f".partial-{name}-*"):  # left by a killed run
                    shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        os.close(lock)


def _load_cached(folder: Path, key: str) -> tuple[Dataset, Prepared]:
    """Return the documents of a folder, after checking its owner and that it is complete.

    Raises:
        UnusableCache: they belong to another user, are damaged, or were made from other data.
    """
    import datasets

    documents = folder / DOCUMENTS
    _check_private(folder, stat.S_ISDIR)
    for name in (FIGURES, DOCUMENTS):
        _check_private(folder / name, stat.S_ISREG)
    try:
        cached = json.loads(read_regular(folder / FIGURES, at_most=_FIGURES_BYTES))
        facts = cached["facts"]
        undamaged = cached["sha256"] == _text_digest(facts)
        undamaged = undamaged and facts["documents"] == _digest(documents)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        undamaged = False
    if not undamaged:
        raise UnusableCache("it is damaged")
    if facts["key"] != key:
        raise UnusableCache("it was made from other data")
    figures = replace(SourceFigures(**facts["figures"]), kept=True, reused=True)
    return datasets.Dataset.from_file(str(documents)), (figures, tuple(facts["warnings"]))


def _check_private(path: Path, is_kind: Callable[[int], bool]) -> None:
    try:
        check_private(path.lstat(), is_kind=is_kind)
    except NotPrivate as error:
        raise UnusableCache(f"{path.name}: {error}") from None
    except OSError as error:
        raise UnusableCache(f"{path.name} cannot be read: {error.strerror}") from None


def _write(
    root: Path,
    folder: Path,
    key: str,
    make: Callable[[Write], Prepared],
    columns: pyarrow.Schema,
) -> None:
    """Write to a temporary folder, and rename it when complete, so that a kill leaves no cache."""
    import pyarrow

    partial = Path(tempfile.mkdtemp(prefix=f".partial-{folder.name}-", dir=root))
    try:
        with (
            os.fdopen(_create(partial / DOCUMENTS), "wb") as file,
            pyarrow.ipc.new_stream(file, columns) as stream,
        ):
            figures, warnings = make(stream.write_batch)
        facts: dict[str, object] = {
            "key": key,
            "documents": _digest(partial / DOCUMENTS),
            "figures": asdict(figures),
            "warnings": warnings,
        }
        text = json.dumps({"sha256": _text_digest(facts), "facts": facts}, indent=1)
        with os.fdopen(_create(partial / FIGURES), "wb") as file:
            file.write(text.encode())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_digest(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

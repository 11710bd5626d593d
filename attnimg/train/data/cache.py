"""Cache prepared documents in dataset_prepared_path, so that a second run need not tokenize.

There is one folder for each source and user, named after a hash of all that its documents depend
on: the bytes of the data, the tokenizer, this package's code. It is used only if it is complete and
belongs to the user; otherwise the documents are prepared again, and a warning gives the reason.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config, is_chat
from attnimg.errors import AttnimgError
from attnimg.files import NotPrivate, check_private
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.documents import SourceFigures
from attnimg.train.data.prepare import schema, strategy_for
from attnimg.train.data.sources import Source

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

# Packages that the prepared documents depend on, besides this one.
PACKAGES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
DOCUMENTS, FIGURES = "documents.arrow", "figures.json"

Write = Callable[["pyarrow.RecordBatch"], None]
Prepared = tuple[SourceFigures, tuple[str, ...]]


class Unusable(Exception):
    """Raised for a cached folder that can't be used; the message is the reason."""


def cache_key(source: Source, config: Config, tokenizer: Any) -> str:
    """Return a hash of all that a source's documents depend on."""
    paths = [file.path for file in source.files]
    if source.kind == "saved":
        folder = Path(source.spec.path).expanduser()
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    template = None
    if is_chat(source.spec):
        template = choose_chat_template(config, tokenizer, spec=source.spec, key=source.key)
    facts = {
        "code": [_digest(path) for path in sorted(Path(__file__).parent.glob("*.py"))],
        "packages": {name: version(name) for name in PACKAGES},
        "spec": source.spec.model_dump(mode="json"),
        "data": [(path.name, _digest(path)) for path in paths],
        "sequence_len": config.sequence_len,
        "strategy": strategy_for(source, config),
        "train_on_inputs": config.train_on_inputs,
        "system_message": config.default_system_message,
        "eot_tokens": config.eot_tokens,
        "template": template,
        # Templates such as Llama 3.1's write the current date.
        "day": str(date.today()) if "strftime_now" in json.dumps(template) else None,
        "tokenizer": backend.to_str() if backend is not None else tokenizer.get_vocab(),
        "special_tokens": str(tokenizer.special_tokens_map),
    }
    return _text_digest(facts)


def make_in_memory(make: Callable[[Write], Prepared]) -> tuple[Dataset, Prepared]:
    """Prepare documents and return them in memory: 8 bytes per token."""
    import datasets
    import pyarrow

    batches: list[pyarrow.RecordBatch] = []
    figures, warnings = make(batches.append)
    table = datasets.table.InMemoryTable(pyarrow.Table.from_batches(batches, schema=schema()))
    return datasets.Dataset(table, fingerprint=figures.content[:16]), (figures, warnings)


def make_on_disk(
    root: Path, key: str, make: Callable[[Write], Prepared]
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
                    return _load_kept(folder, key)
            except Unusable as error:
                refused = (f"{folder} is not used, as {error}",)
                _remove(folder)
            _write(root, folder, key, make)
            documents, (figures, warnings) = _load_kept(folder, key)
    except (OSError, Unusable) as error:
        raise AttnimgError(
            f"cannot write prepared documents to {root}",
            why="\n".join((*refused, str(error))),
            do="remove dataset_prepared_path to prepare the documents in memory, or set it to a "
            "folder of your own that has space",
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


def _load_kept(folder: Path, key: str) -> tuple[Dataset, Prepared]:
    """Return the documents of a folder, after checking its owner and that it is complete.

    Raises:
        Unusable: they belong to another user, are damaged, or were made from other data.
    """
    import datasets

    documents = folder / DOCUMENTS
    _check_own(folder, stat.S_ISDIR)
    for name in (FIGURES, DOCUMENTS):
        _check_own(folder / name, stat.S_ISREG)
    try:
        kept = json.loads((folder / FIGURES).read_bytes())
        facts = kept["facts"]
        whole = kept["sha256"] == _text_digest(facts) and facts["documents"] == _digest(documents)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Unusable("it is damaged")
    if facts["key"] != key:
        raise Unusable("it was made from other data")
    figures = replace(SourceFigures(**facts["figures"]), reused=True)
    return datasets.Dataset.from_file(str(documents)), (figures, tuple(facts["warnings"]))


def _check_own(path: Path, is_kind: Callable[[int], bool]) -> None:
    try:
        check_private(path.lstat(), is_kind=is_kind)
    except NotPrivate as error:
        raise Unusable(f"{path.name}: {error}") from None
    except OSError as error:
        raise Unusable(f"{path.name} cannot be read: {error.strerror}") from None


def _write(root: Path, folder: Path, key: str, make: Callable[[Write], Prepared]) -> None:
    """Write to a temporary folder, and rename it when complete, so that a kill leaves no cache."""
    import pyarrow

    partial = Path(tempfile.mkdtemp(prefix=f".partial-{folder.name}-", dir=root))
    try:
        with (
            os.fdopen(_created(partial / DOCUMENTS), "wb") as file,
            pyarrow.ipc.new_stream(file, schema()) as stream,
        ):
            figures, warnings = make(stream.write_batch)
        facts: dict[str, object] = {
            "key": key,
            "documents": _digest(partial / DOCUMENTS),
            "figures": asdict(figures),
            "warnings": warnings,
        }
        text = json.dumps({"sha256": _text_digest(facts), "facts": facts}, indent=1)
        with os.fdopen(_created(partial / FIGURES), "wb") as file:
            file.write(text.encode())
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _created(path: Path) -> int:
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

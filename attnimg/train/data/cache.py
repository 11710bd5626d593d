"""Keep prepared documents in dataset_prepared_path, so that a second run need not tokenize.

One folder a source, named after all that its documents depend on. It is written under another
name and renamed when it is whole: a killed run leaves nothing that a later one would take for it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.errors import AttnimgError
from attnimg.schema import Config
from attnimg.train.data.chat_templates import choose_chat_template
from attnimg.train.data.documents import SourceFigures
from attnimg.train.data.lengths import strategy_for
from attnimg.train.data.prepare import schema
from attnimg.train.data.sources import Source
from attnimg.train.data.types import is_chat

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

VERSION = 1  # raised when the same input gives other documents

Write = Callable[["pyarrow.RecordBatch"], None]
Made = tuple[SourceFigures, tuple[str, ...]]


def cache_key(source: Source, config: Config, tokenizer: Any) -> str:
    """Hash all that a source's documents depend on."""
    files = [(str(file.path.resolve()), file.path.stat()) for file in source.files]
    folder = Path(source.spec.path) if source.kind == "saved" else None
    if folder is not None:
        files += [(str(path), path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = {
        "version": VERSION,
        "spec": source.spec.model_dump(mode="json"),
        "files": [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files],
        "sequence_len": config.sequence_len,
        "strategy": strategy_for(source, config),
        "train_on_inputs": config.train_on_inputs,
        "system_message": config.default_system_message,
        "eot_tokens": config.eot_tokens,
        "template": choose_chat_template(config, tokenizer, spec=source.spec, key=source.key)
        if is_chat(source.spec)
        else None,
        "tokenizer": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab()),
        "special_tokens": str(tokenizer.special_tokens_map),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def in_memory(make: Callable[[Write], Made], *, fingerprint: str) -> tuple[Dataset, Made]:
    """Make documents and hold them in memory: 8 bytes a token."""
    import datasets
    import pyarrow

    batches: list[pyarrow.RecordBatch] = []
    made = make(batches.append)
    table = pyarrow.Table.from_batches(batches, schema=schema())
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=fingerprint), made


def on_disk(root: Path, key: str, make: Callable[[Write], Made]) -> tuple[Dataset, Made]:
    """Give the documents kept under a key, or make and keep them; they stay on disk (mmap).

    Raises:
        AttnimgError: the folder can't be written, or the disk is full.
    """
    import datasets

    folder = root / key
    reused = (folder / "figures.json").is_file()
    if not reused:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _write(root, folder, make)
        except OSError as error:
            raise AttnimgError(
                f"cannot keep prepared documents in {root}",
                why=str(error),
                do="set dataset_prepared_path to a folder that can be written and has space, "
                "or take it out to prepare in memory",
                code="not-writable",
                key="dataset_prepared_path",
            ) from None
    kept = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    figures = replace(SourceFigures(**kept["figures"]), reused=reused)
    documents = datasets.Dataset.from_file(str(folder / "documents.arrow"))
    return documents, (figures, tuple(kept["warnings"]))


def _write(root: Path, folder: Path, make: Callable[[Write], Made]) -> None:
    import pyarrow

    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
    try:
        with (
            (partial / "documents.arrow").open("wb") as file,
            pyarrow.ipc.new_stream(file, schema()) as stream,
        ):
            figures, warnings = make(stream.write_batch)
        text = json.dumps({"figures": asdict(figures), "warnings": warnings}, indent=1)
        (partial / "figures.json").write_text(text, encoding="utf-8")
        partial.chmod(0o755)  # mkdtemp's 0700 would lock out other users of a shared cache
        try:
            partial.replace(folder)
        except OSError:
            # Another process of this run was first; its documents are the same.
            if not (folder / "figures.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)

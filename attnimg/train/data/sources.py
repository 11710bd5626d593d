"""Find what a dataset entry names: local files, a saved dataset, or a name on the hub.

A path that exists here is always taken before the hub, as in axolotl.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnimg.errors import AttnimgError
from attnimg.schema import Config, DatasetSpec

Format = Literal["json", "csv", "parquet", "text"]

FORMATS: dict[str, Format] = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".txt": "text", ".text": "text",
}  # fmt: skip

# `path: json` with data_files is the datasets library's way to name a format.
BUILDERS = frozenset({"json", "csv", "parquet", "text"})

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    """One file and the format its records are in."""

    path: Path
    format: Format


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One entry of the config and where its records are.

    Attributes:
        key: "datasets[0]".
        spec: the entry.
        kind: files here, a folder of datasets' save_to_disk, or a name on the hub.
        files: the local files, in the order they are read; empty for the other kinds.
    """

    key: str
    spec: DatasetSpec
    kind: Literal["files", "saved", "hub"]
    files: tuple[LocalFile, ...] = ()


def entries(config: Config) -> Iterator[tuple[str, DatasetSpec, bool]]:
    """Yield key, entry, and whether it is for training, in the order of the config."""
    for name, specs in (
        ("datasets", config.datasets),
        ("pretraining_dataset", config.pretraining_dataset),
        ("test_datasets", config.test_datasets),
    ):
        for index, spec in enumerate(specs or ()):
            if name == "pretraining_dataset" and spec.type is None:
                spec = spec.model_copy(update={"type": "pretrain"})  # as in axolotl
            yield f"{name}[{index}]", spec, name != "test_datasets"


def find_source(spec: DatasetSpec, *, key: str) -> Source:
    """Say where an entry's records are, without reading them.

    Raises:
        AttnimgError: no such file, a folder without data, mixed formats, or no possible name.
    """
    root = Path(spec.path).expanduser()
    if spec.data_files and (root.is_dir() or spec.path in BUILDERS):
        base = root if root.is_dir() else Path()
        found = [file for pattern in spec.data_files for file in _matches(base, pattern, key=key)]
        builder = spec.path if spec.path in BUILDERS and not root.is_dir() else None
        return Source(key=key, spec=spec, kind="files", files=_files(found, spec, builder, key))
    if root.is_dir():
        if (root / "state.json").exists() or (root / "dataset_dict.json").exists():
            return Source(key=key, spec=spec, kind="saved")
        return Source(key=key, spec=spec, kind="files", files=_folder(root, spec, key=key))
    if root.exists() or glob.has_magic(spec.path):
        found = [root] if root.exists() else _matches(Path(), spec.path, key=key)
        return Source(key=key, spec=spec, kind="files", files=_files(found, spec, None, key))
    suffixed = any(suffix in FORMATS for suffix in _suffixes(root))
    if suffixed or not HUB_NAME.fullmatch(spec.path):
        raise _missing(spec.path, key=f"{key}.path")
    return Source(key=key, spec=spec, kind="hub")


def _missing(path: str, *, key: str) -> AttnimgError:
    return AttnimgError(
        f"dataset not found: {path}",
        why=f"{key} is {path}, which is no file or folder under {Path.cwd()}",
        do="correct the path; a relative one starts where attnimg is called",
        code="file-missing",
        key=key,
    )


def _matches(base: Path, pattern: str, *, key: str) -> list[Path]:
    if (base / pattern).is_file():
        return [base / pattern]
    # Path.glob takes no absolute pattern, which data_files may be.
    matches = glob.glob(str(base / pattern), recursive=True)  # noqa: PTH207
    found = sorted(Path(match) for match in matches)
    found = [path for path in found if path.is_file()]
    if not found:
        raise _missing(str(base / pattern), key=f"{key}.path")
    return found


def _suffixes(path: Path) -> list[str]:
    return [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]


def _format(path: Path) -> Format | None:
    suffixes = _suffixes(path)
    return FORMATS.get(suffixes[0]) if suffixes else None


def _folder(root: Path, spec: DatasetSpec, *, key: str) -> tuple[LocalFile, ...]:
    found = sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and _format(path) in ((spec.ds_type,) if spec.ds_type else tuple(FORMATS.values()))
    )
    formats = sorted({_format(path) or "" for path in found})
    if not found:
        raise AttnimgError(
            f"no data in the folder {spec.path}",
            why=f"found no {spec.ds_type or 'json, jsonl, csv, parquet or text'} file in it",
            do=f"name the file in {key}.path, or its files in {key}.data_files",
            code="file-missing",
            key=f"{key}.path",
        )
    if len(formats) > 1:
        raise AttnimgError(
            f"the folder {spec.path} holds files of several formats",
            why=f"found {', '.join(formats)}; one dataset has one format",
            do=f"set {key}.ds_type to one of them, or name the files in {key}.data_files",
            code="bad-value",
            key=f"{key}.ds_type",
        )
    return _files(found, spec, None, key)


def _files(
    paths: Sequence[Path], spec: DatasetSpec, builder: str | None, key: str
) -> tuple[LocalFile, ...]:
    """Give each file its format: what the config says, else what its name says."""
    files = []
    for path in paths:
        declared = spec.ds_type or next((f for f in FORMATS.values() if f == builder), None)
        kind = declared or _format(path)
        if kind is None:
            raise AttnimgError(
                f"the format of {path} is not known",
                why=f"found the name {path.name}, needed one of {' '.join(FORMATS)}",
                do=f"set {key}.ds_type to json, csv, parquet or text",
                code="bad-value",
                key=f"{key}.ds_type",
            )
        if not os.access(path, os.R_OK):
            raise AttnimgError(
                f"no permission to read {path}",
                why=f"user {os.getuid()} may not read it",
                do=f"chmod a+r {path}",
                code="bad-data",
                key=f"{key}.path",
            )
        files.append(LocalFile(path=path, format=kind))
    return tuple(files)

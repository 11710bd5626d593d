"""Find what a dataset entry names (local files, a saved dataset or a hub name), and load it.

A local path takes precedence over a hub name, as in axolotl. Files are read by records.py.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from attnimg.config.schema import DatasetSpec
from attnimg.errors import AttnimgError
from attnimg.train.data.prompts import choose_prompt
from attnimg.train.data.records import (
    BROKEN,
    COLUMNS,
    COMPRESSED,
    Format,
    LocalFile,
    Place,
    Record,
    bad_file,
    check_file_type,
    check_regular,
    open_data,
    read_records,
)
from attnimg.train.data.splits import (
    find_rows,
    folder_splits,
    requested_split,
    split_in_name,
    split_names,
)

if TYPE_CHECKING:
    from datasets import Dataset

FORMATS: dict[str, Format] = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".text": "text",
}  # fmt: skip

# `path: json` with data_files is how the datasets library names a format.
BUILDERS: dict[str, Format] = {name: name for name in FORMATS.values()}

# Limit of folders and files without records in a folder of data. Resolving splits takes 1 ms of CPU
# time for each of them (datasets 5.2, 10,000 files, 2026-11-27).
_MAX_OTHER_FILES = 10_000

# Timeout of the first request to the hub; the datasets library tries for half a minute.
TIMEOUT_SECONDS = 10

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One dataset entry of the config, and where its records are.

    Attributes:
        key: "datasets[0]".
        spec: the entry.
        kind: local files, a folder written by datasets' save_to_disk, or a name on the hub.
        splits: for the kind "files", all existing splits, with the files of those that the entry
            names, in the order in which they are read.
        files: the files that are read.
        warnings: warnings on parts of the source that are not read.
    """

    key: str
    spec: DatasetSpec
    kind: Literal["files", "saved", "hub"]
    splits: Mapping[str, tuple[LocalFile, ...]] = field(default_factory=dict)
    files: tuple[LocalFile, ...] = ()
    warnings: tuple[str, ...] = ()


def find_source(spec: DatasetSpec, *, key: str) -> Source:
    """Find where an entry's records are, without reading them.

    Raises:
        AttnimgError: no such file, a folder without data, mixed formats, no such split, not a
            regular file, or not a valid name.
    """
    try:
        return _locate(spec, key=key)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~user without a home
        what = f"cannot read {spec.path}"
        why = f"{key}.path: {getattr(error, 'strerror', None) or error}"
        do = f"correct {key}.path, or the permissions of its folders"
        raise bad_file(what, why=why, do=do, key=key) from None


def load_hub(source: Source) -> Mapping[str, Dataset]:
    """Load the splits of a dataset from the hub, or from its cache when HF_HUB_OFFLINE is set.

    Raises:
        AttnimgError: no connection (hub-unreachable), no such dataset, or one that can't be read.
    """
    import datasets

    return cast("Mapping[str, Dataset]", _load(source, datasets.load_dataset))


def stream_hub(source: Source) -> Iterator[dict[str, Any]]:
    """Yield the records of one split of a dataset from the hub, without downloading all of it.

    Raises:
        AttnimgError: as load_hub; or the entry names rows of a split.
    """
    import datasets

    split = requested_split(source.spec, (), key=source.key)
    if not re.fullmatch(r"[\w.]+", split):
        what, key = f"{split} cannot be streamed", f"{source.key}.split"
        why = f"{key} names rows, or several splits, of which the library streams none"
        do = f"set {key}: {split.partition('[')[0].partition('+')[0].strip()}"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=key)
    rows = _load(source, partial(datasets.load_dataset, split=split, streaming=True))
    try:
        yield from rows
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error, offline=False) from None


def _load(source: Source, load: Callable[..., Any]) -> Any:
    """Load a dataset from the hub with a function of the datasets library."""
    import datasets
    from huggingface_hub import constants

    spec = source.spec
    if spec.trust_remote_code:
        key, what = f"{source.key}.trust_remote_code", "datasets with own code are not supported"
        why = f"found {key}: true; the datasets library no longer runs such code"
        do = "convert the dataset to Parquet, and remove trust_remote_code"
        raise AttnimgError(what, why=why, do=do, code="unsupported-key", key=key)
    if not constants.HF_HUB_OFFLINE:
        _check_reachable(source)
    try:
        return load(spec.path, spec.name, revision=spec.revision, data_files=spec.data_files)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise _unreadable(source, error, offline=constants.HF_HUB_OFFLINE) from None


def load_saved(source: Source) -> Mapping[str, Dataset]:
    """Load the splits of a folder that `save_to_disk` wrote.

    A single saved `Dataset` has the name of the split that it was taken from.

    Raises:
        AttnimgError: the folder is damaged.
    """
    import datasets
    import pyarrow

    try:
        loaded = datasets.load_from_disk(Path(source.spec.path).expanduser())
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise bad_file(
            f"cannot read the saved dataset {source.spec.path}",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            do=f'set {source.key}.data_files: "*.arrow", which reads its files directly, or '
            "write it again with save_to_disk",
            key=source.key,
        ) from None
    if not isinstance(loaded, datasets.Dataset):
        return cast("Mapping[str, Dataset]", loaded)
    # "test[:10%]" is a part of test; a dataset made of several splits counts as train.
    name = str(loaded.split or "train").partition("[")[0]
    return {name if "+" not in str(loaded.split) else "train": loaded}


def read_source(source: Source, *, stream: bool = False) -> Iterator[Record]:
    """Yield the records of a source in order, each with its place.

    Args:
        source: the source.
        stream: whether a dataset of the hub is read as it is downloaded, file by file.

    Raises:
        AttnimgError: the data are missing or broken, or the split does not exist.
    """
    if source.kind == "files":
        yield from _read_files(source)
        return
    spec, key = source.spec, source.key
    if stream and source.kind == "hub":
        for number, record in enumerate(stream_hub(source), start=1):
            yield Place(spec.path, number, "record", key, number == 1), record
        return
    loaded = load_hub(source) if source.kind == "hub" else load_saved(source)
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
    if "[" not in requested_split(spec, lengths, key=key):
        for name in names:
            yield from read(name)
        return
    lengths |= {name: sum(1 for _ in read(name)) for name in names}
    for name, start, stop in find_rows(spec, lengths, key=key):
        yield from islice(read(name), start, stop)


def _locate(spec: DatasetSpec, *, key: str) -> Source:
    """Return the source of an entry: data_files, a folder, a file, a pattern or a hub name."""
    root = Path(spec.path).expanduser()
    is_folder = root.is_dir()
    if spec.data_files and (is_folder or spec.path in BUILDERS):
        base, where = root if is_folder else Path(), f"{key}.data_files"
        found = [
            p for name in spec.data_files for p in _find_files(base, name, key=key, where=where)
        ]
        return _make_source(spec, {"train": found}, key=key)
    if is_folder:
        if (root / "state.json").exists() or (root / "dataset_dict.json").exists():
            _check_size(root, key=f"{key}.path", where=key)
            for path in root.rglob("*"):
                if not path.is_dir():
                    check_regular(path, key=key)
            return Source(key=key, spec=spec, kind="saved")
        return _folder_source(root, spec, key=key)
    if root.exists() or glob.has_magic(spec.path):
        where = f"{key}.path"
        found = [root] if root.exists() else _find_files(Path(), spec.path, key=key, where=where)
        return _make_source(spec, {"train": found}, key=key)
    if _detect_format(root) or not HUB_NAME.fullmatch(spec.path):
        raise _not_found(spec.path, key=f"{key}.path")
    return Source(key=key, spec=spec, kind="hub")


def _make_source(
    spec: DatasetSpec,
    splits: Mapping[str, Sequence[Path]],
    *,
    key: str,
    warnings: tuple[str, ...] = (),
) -> Source:
    """Return the source with the files of the splits that the entry names."""
    names = split_names(spec, splits, key=key)
    read = {
        split: tuple(_local_file(path, spec, key=key) for path in splits[split]) for split in names
    }
    return Source(
        key=key,
        spec=spec,
        kind="files",
        splits={split: read.get(split, ()) for split in splits},
        files=tuple(file for files in read.values() for file in files),
        warnings=warnings,
    )


def _not_found(path: str, *, key: str) -> AttnimgError:
    what = f"dataset not found: {path}"
    why = f"{key} is {path}, which is not a file or folder under {Path.cwd()}"
    do = "correct the path; a relative path starts at the current folder"
    return AttnimgError(what, why=why, do=do, code="file-missing", key=key)


def _find_files(base: Path, pattern: str, *, key: str, where: str) -> list[Path]:
    """Return the files that a name or a pattern matches, sorted."""
    if (base / pattern).exists():
        return [base / pattern]
    if "**" in pattern:
        parts = (base / pattern).parts
        fixed = Path(*takewhile(lambda part: not glob.has_magic(part), parts))
        _check_size(fixed, key=where, where=key)
    # Path.glob does not accept absolute patterns, which data_files may have.
    matches = glob.glob(str(base / pattern), recursive=True)  # noqa: PTH207
    found = sorted(Path(match) for match in matches if not Path(match).is_dir())
    if not found:
        raise _not_found(str(base / pattern), key=f"{key}.path")
    splits = {split_in_name(path): path for path in reversed(found)}
    if len(splits) > 1 and not splits.keys() <= {None, "train"}:
        named = ", ".join(f"{path.name} ({split or 'no split'})" for split, path in splits.items())
        what = f"the pattern {pattern} matches files of several splits"
        why = f"found {named}; a pattern would include test files in training"
        do = f"set {where}: {splits.get('train', found[0])}, or list the files to use"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=where)
    return found


def _check_size(root: Path, *, key: str, where: str) -> None:
    """Raise for a folder that is not a data folder, such as `/`, before all of it is searched.

    Args:
        root: the folder.
        key: the config key that names it.
        where: the key of the entry, "datasets[0]".
    """
    others = 0
    for folder, folders, files in os.walk(root):
        # `hf download` writes a file for each downloaded file into .cache.
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += len(folders) + sum(_detect_format(Path(name)) is None for name in files)
        if others > _MAX_OTHER_FILES:
            what = f"the folder {root} has too many files that are not data"
            why = f"found more than {_MAX_OTHER_FILES:,} folders and other files, up to {folder}"
            do = f"name the file in {where}.path, or its files in {where}.data_files"
            raise AttnimgError(what, why=why, do=do, code="bad-data", key=key)


def _detect_format(path: Path) -> Format | None:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _folder_source(root: Path, spec: DatasetSpec, *, key: str) -> Source:
    """Return the source of a folder of data files."""
    _check_size(root, key=f"{key}.path", where=key)
    formats_to_read = (spec.ds_type,) if spec.ds_type else tuple(FORMATS.values())

    def is_data(path: Path) -> bool:
        # Subfolders that save_to_disk wrote have a state.json, which has no records.
        saved = path.name == "state.json" and (path.parent / "dataset_info.json").exists()
        return _detect_format(path) in formats_to_read and not saved

    found, others = folder_splits(root, spec, is_data=is_data, key=key)
    splits = {split: paths for split, paths in found.items() if paths}
    if not splits:
        what = f"no data in the folder {spec.path}"
        why = f"found no {spec.ds_type or 'json, jsonl, csv, parquet, arrow or text'} file in it"
        do = f"name the file in {key}.path, or its files in {key}.data_files"
        raise AttnimgError(what, why=why, do=do, code="file-missing", key=f"{key}.path")
    requested = split_names(spec, splits, key=key)
    formats = sorted({_detect_format(path) or "" for split in requested for path in splits[split]})
    if len(formats) > 1:
        what = f"the folder {spec.path} contains files of several formats"
        why = f"found {', '.join(formats)}; one dataset has one format"
        do = f"set {key}.ds_type: {' or '.join(formats)}, or name files in {key}.data_files"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.ds_type")
    warnings: tuple[str, ...] = ()
    if others:
        names = ", ".join(str(path.relative_to(root)) for path in others[:5])
        more = f" and {len(others) - 5:,} more" if len(others) > 5 else ""
        warnings = (
            f"{spec.path}: {names}{more} not read, because the folder's other files are named "
            f"after splits ({', '.join(splits)}) and these are not; list them in {key}.data_files "
            "to train on them",
        )
    return _make_source(spec, splits, key=key, warnings=warnings)


def _local_file(path: Path, spec: DatasetSpec, *, key: str) -> LocalFile:
    """Return a file with its format, from the config or else from its name.

    Raises:
        AttnimgError: it is not a regular file, can't be read, is an archive, or has no known
            format.
    """
    check_regular(path, key=key)
    if not os.access(path, os.R_OK):
        what = f"no permission to read {path}"
        why = f"user {os.getuid()} may not read it"
        do = f"chmod a+r {path}"
        raise bad_file(what, why=why, do=do, key=key)
    named_builder = spec.data_files and not Path(spec.path).is_dir()
    builder = BUILDERS.get(spec.path) if named_builder else None
    kind = spec.ds_type or builder or _detect_format(path)
    check_file_type(path, declared=kind, key=key)
    if kind is None:
        suggested = ["csv", "text"]
        with suppress(*BROKEN), open_data(path) as file:
            suggested = ["json"] if file.read(64).lstrip()[:1] in (b"{", b"[") else suggested
        what = f"the format of {path} is not known"
        why = f"found the name {path.name}, needed one of {' '.join(FORMATS)}"
        do = f"set {key}.ds_type: {' or '.join(suggested)}"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.ds_type")
    named = (spec.field, spec.text_column, spec.field_messages, spec.field_chosen)
    prompt = choose_prompt(spec)
    columns = COLUMNS.union(filter(None, named), prompt.columns if prompt else ())
    return LocalFile(path=path, format=kind, columns=columns)


def _check_reachable(source: Source) -> None:
    """Check that the hub can be reached and has the dataset."""
    from huggingface_hub import HfApi, errors

    spec, key = source.spec, f"{source.key}.path"
    try:
        HfApi().dataset_info(spec.path, revision=spec.revision, timeout=TIMEOUT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = f"dataset not found: {spec.path}"
        why = f"no such file or folder here, and the hub answers: {str(error).splitlines()[0]}"
        do = "correct the path; for a private dataset set HF_TOKEN"
        raise AttnimgError(what, why=why, do=do, code="file-missing", key=key) from None
    # The hub client's releases use different HTTP libraries.
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # re-exported
        what = f"dataset not found here, and the hub can't be reached: {spec.path}"
        why = f"no such file or folder here; the request to the hub failed: {error}"
        do = "correct the path, restore the connection, or set HF_HUB_OFFLINE=1 for an old download"
        raise AttnimgError(what, why=why, do=do, code="hub-unreachable", key=key) from None


def _unreadable(source: Source, error: Exception, *, offline: bool) -> AttnimgError:
    spec = source.spec
    reason = " ".join((str(error).splitlines() or [type(error).__name__])[:2])
    if offline and isinstance(error, ConnectionError | FileNotFoundError):
        what, key = f"dataset not found: {spec.path}", f"{source.key}.path"
        why = f"not found here or in the hub's cache, and HF_HUB_OFFLINE is set ({reason})"
        do = "correct the path, or download the dataset first without HF_HUB_OFFLINE"
        return AttnimgError(what, why=why, do=do, code="file-missing", key=key)
    do = f"correct {source.key}: path, name, split, revision and data_files"
    if "config" in reason.lower():  # the name of a config is missing, or does not exist
        do = f"set {source.key}.name to one of them"
    return bad_file(f"cannot read the dataset {spec.path}", why=reason, do=do, key=source.key)

"""Resolve which files of a folder belong to which split, and which rows a split names.

Both are done with the functions of the datasets library, so that a folder has the same rows as with
`load_dataset`. Source: https://huggingface.co/docs/datasets/v4.4.1/repository_structure
and .../loading#slice-splits (2026-11-26).
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnimg.config.schema import DatasetSpec
from attnimg.errors import AttnimgError, counted
from attnimg.train.data.records import bad_file, check_regular

RowRange = tuple[str, int, int]  # a split, its first row and the one after its last

# Errors that datasets raises for a README with invalid configs.
_UNUSABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def requested_split(spec: DatasetSpec, names: Collection[str], *, key: str) -> str:
    """Return the split that an entry names, or axolotl's default.

    Source: axolotl 0.18.0, utils/data/sft.py:391-400: train, and test for test_datasets. A
    source of test_datasets that has a single split is used as a whole, as a file is.
    """
    if spec.split is not None:
        return spec.split
    if not key.startswith("test_datasets"):
        return "train"
    return next(iter(names)) if len(names) == 1 else "test"


def split_names(spec: DatasetSpec, names: Collection[str], *, key: str) -> list[str]:
    """Return the names of the splits that an entry asks for: both, for `train[:3]+test`.

    Raises:
        AttnimgError: one does not exist.
    """
    requested = requested_split(spec, names, key=key)
    found = re.findall(r"(?:^|\+)\s*([\w.]+)", requested)
    if missing := next((name for name in found if name not in names), None):
        similar = next(iter([*difflib.get_close_matches(missing, names, n=1), *names]))
        set_to = f"{key}.split is {spec.split}" if spec.split else f"{key}.split is not set"
        what = f"no split {missing} in {spec.path}"
        why = f"{set_to}, found {', '.join(names)}"
        do = f"set {key}.split: {similar}, or correct {key}.path"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.split")
    return list(dict.fromkeys(found))


def find_rows(spec: DatasetSpec, lengths: Mapping[str, int], *, key: str) -> list[RowRange]:
    """Return the rows that an entry's split names, in order.

    Args:
        spec: the entry.
        lengths: the splits that exist, and the number of rows in each.
        key: "datasets[0]".

    Raises:
        AttnimgError: the split does not exist, or has no rows.
    """
    import datasets

    requested, names = requested_split(spec, lengths, key=key), split_names(spec, lengths, key=key)
    try:
        parts = datasets.ReadInstruction.from_spec(requested).to_absolute(lengths)
    except ValueError as error:
        what = f"{requested} does not name a split of {spec.path}"
        why = f"{error}; needed a split ({', '.join(lengths)}), or rows of one"
        first = next(iter(lengths))
        do = f"set {key}.split: {first}, or {first}[:1000], or {first}[10%:20%]"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.split") from None
    found = [(part.splitname, part.from_, max(part.from_, part.to)) for part in parts]
    if "[" in requested and all(start == stop for _, start, stop in found):
        rows = ", ".join(f"{counted(lengths[name], 'row')} in {name}" for name in names)
        what = f"no rows in {requested} of {spec.path}"
        why = f"found {rows}, and {key}.split selects none of them"
        do = f"set {key}.split: {names[0]}"
        raise AttnimgError(what, why=why, do=do, code="empty-dataset", key=f"{key}.split")
    return found


def folder_splits(
    root: Path, spec: DatasetSpec, *, is_data: Callable[[Path], bool], key: str
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return the files of each split of a folder, and those that belong to none.

    Args:
        root: the folder.
        spec: the dataset entry; its `name` is one of the README's configs.
        is_data: whether a file has records; others are ignored.
        key: "datasets[0]".

    Raises:
        AttnimgError: the README's configs can't be used, none has the entry's name, or a file
            belongs to two splits.
    """
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern

    # The folder's own name may have a bracket, which is not a pattern.
    base = glob.escape(str(root.resolve()))

    def resolve(patterns: Iterable[str]) -> list[Path]:
        found = set[str]()
        for pattern in patterns:
            with suppress(FileNotFoundError):
                found.update(resolve_pattern(pattern, base))
        return [path for path in _paths_in(root, found, key=key) if is_data(path)]

    if (configured := _readme_splits(root, spec, key=key)) is not None:
        return {s: list(filter(is_data, found)) for s, found in configured.items()}, []
    if spec.name is not None:
        what = f"no configuration {spec.name} in {spec.path}"
        why = f"{key}.name is {spec.name}, found no README.md with configs in the folder"
        do = f"remove {key}.name, or correct {key}.path"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.name")
    try:
        patterns = get_data_patterns(base)
    except EmptyDatasetError:
        return {}, []
    splits = {str(split): resolve(of_split) for split, of_split in patterns.items()}
    seen = dict[Path, str]()
    for split, paths in splits.items():
        for path in paths:
            if path in seen:
                what = f"{path} belongs to two splits"
                why = f"its name contains {seen[path]} and {split}, needed one split"
                do = f"name the files to use in {key}.data_files, or rename this one"
                raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.data_files")
            seen[path] = split
    return splits, [path for path in resolve(["**"]) if path not in seen]


def _readme_splits(root: Path, spec: DatasetSpec, *, key: str) -> dict[str, list[Path]] | None:
    """Return the files that the README's `configs` name; None if it has no configs."""
    import datasets
    import yaml
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    readme, other = root / "README.md", root / ".huggingface.yaml"
    if other.exists():
        check_regular(other, key=key)
    try:
        has_configs = other.exists()
        if readme.is_file() and readme.read_bytes().startswith(b"---"):
            data = DatasetCard.load(readme, ignore_metadata_errors=True).data
            has_configs = has_configs or bool(MetadataConfigs.from_dataset_card_data(data))
        if not has_configs:
            return None
        with tempfile.TemporaryDirectory() as cache:  # only the configs are read: no cache needed
            path = str(root.resolve())
            builder = datasets.load_dataset_builder(path, spec.name, cache_dir=cache)
    except (*_UNUSABLE, datasets.exceptions.DatasetsError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"cannot use the configs in {readme}"
        why = reason.partition(" with any supported extension")[0][:300]
        do = f"set {key}.name to one of its configs, or name the files in {key}.data_files"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.name") from None
    config = builder.config
    files = {str(s): _paths_in(root, found, key=key) for s, found in config.data_files.items()}
    _check_options(config, readme, files, key=key)
    return files


def _check_options(
    config: Any, readme: Path, files: Mapping[str, Sequence[Path]], *, key: str
) -> None:
    """Raise if the README sets options of the reader, which are not supported."""
    plain = type(config)()
    tabs = all(".tsv" in path.suffixes for found in files.values() for path in found)
    changed = [
        f"{name} {value!r}"
        for name, value in vars(config).items()
        if name not in ("name", "version", "data_dir", "data_files", "description")
        and value != getattr(plain, name)
        and not (name == "sep" and value == "\t" and tabs)
    ]
    if changed:
        what = f"cannot use the options in {readme}"
        why = f"found {', '.join(changed)}; needed files that are read without options"
        do = f"convert the files to JSON lines or Parquet, and name those in {key}.data_files"
        raise AttnimgError(what, why=why, do=do, code="bad-value", key=f"{key}.name")


def _paths_in(root: Path, found: Iterable[str], *, key: str) -> list[Path]:
    """Return files as paths below the folder as the config names it, sorted."""
    base, paths = root.resolve(), list[Path]()
    for name in found:
        path = Path(os.path.normpath(name))
        if not path.is_relative_to(base):
            what = f"{root} names a file outside of it"
            why = f"found {name} in its README.md, needed files in the folder"
            do = f"name the files in {key}.data_files"
            raise bad_file(what, why=why, do=do, key=key)
        paths.append(root / path.relative_to(base))
    return sorted(paths)


def split_in_name(path: Path) -> str | None:
    """Return the split in a file's or folder's name, by the keywords of the datasets library."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    for part in (path.parent.name, path.name):
        words = re.split(f"[{NON_WORDS_CHARS}]", part)
        for split, keywords in SPLIT_KEYWORDS.items():
            if not set(keywords).isdisjoint(words):
                return str(split)
    return None

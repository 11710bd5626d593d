"""Exactly the rows of the split that was asked for: the datasets library is the judge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from advice import edited

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import find_sources
from attnimg.train.data.sources import read_source

CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/part-0.jsonl}
  - {split: test, path: data/part-1.jsonl}
- config_name: other
  data_files: data/part-1.jsonl
---
Words.
"""
# Files of a folder, each with the number of its rows; a name is the text of its rows.
LAYOUTS: dict[str, dict[str, int]] = {
    "names": {"train.jsonl": 10, "test.jsonl": 4, "validation.jsonl": 3},
    "folders": {"train/a.jsonl": 5, "train/b.jsonl": 5, "test/a.jsonl": 4},
    "clone": {
        "data/train-00000-of-00002.parquet": 6, "data/train-00001-of-00002.parquet": 4,
        "data/test-00000-of-00001.parquet": 4, "data/odd-00000-of-00001.parquet": 2,
        "README.md": 0, ".gitattributes": 0,
    },
    "plain": {"a.jsonl": 6, "b.jsonl": 4, "README.md": 0, "notes.md": 0},
    "csv": {"my_train_set.csv": 10, "my-test.csv": 4},
    "text": {"train.txt": 10, "dev.txt": 3},
    "arrow": {"train.arrow": 10, "eval.arrow": 4},
    "zstd": {"train.jsonl.zst": 10, "test.jsonl.zst": 4},
    "card": {"data/part-0.jsonl": 10, "data/part-1.jsonl": 4, "README.md": 1},
    "a [1] folder": {"train.jsonl": 10, "test.jsonl": 4},
}  # fmt: skip


def rows(name: str, count: int) -> list[dict[str, str]]:
    return [{"text": f"{name} {number}"} for number in range(count)]


def write(path: Path, records: list[dict[str, str]]) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    table = pyarrow.Table.from_pylist(records, schema=pyarrow.schema([("text", pyarrow.string())]))
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    elif path.suffix == ".csv":
        path.write_text("text\n" + "".join(record["text"] + "\n" for record in records))
    elif path.suffix == ".txt":
        path.write_text("".join(record["text"] + "\n" for record in records))
    elif path.name == "README.md":
        path.write_text(CARD if records else "Words.")
    else:
        path.write_text(lines)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Write one of LAYOUTS and return its path."""

    def build(layout: str) -> Path:
        for name, count in LAYOUTS[layout].items():
            write(tmp_path / layout / name, rows(name, count))
        return tmp_path / layout

    return build


def read(section: str = "datasets", **entry: Any) -> list[str]:
    known = [{"path": str(entry["path"]), "type": "completion"}]
    config = Config(**{"datasets": known, section: [{"type": "completion", **entry}]})
    training, testing = find_sources(config)
    source = testing[0] if section == "test_datasets" else training[0]
    return [record["text"] for _, record in read_source(source)]


@pytest.mark.parametrize(
    ("layout", "split", "expected"),
    [
        ("names", "train", 10), ("names", "test", 4), ("names", "validation", 3),
        ("names", "train[:3]", 3), ("names", "train[10%:20%]", 1), ("names", "train[-3:]", 3),
        ("names", "train[2:50%]", 5), ("names", "train[:25%]+test[1:]", 5),
        ("names", "train[:100]", 10), ("folders", "train", 10), ("folders", "test", 4),
        ("clone", "train", 10), ("clone", "test[:2]", 2), ("clone", "odd", 2),
        ("plain", "train", 10), ("plain", "train[5:7]", 2), ("csv", "train", 10),
        ("csv", "test", 4), ("text", "train", 10), ("text", "validation", 3),
        ("arrow", "train", 10), ("arrow", "test", 4), ("zstd", "train", 10), ("zstd", "test", 4),
        ("card", "train", 10), ("card", "test", 4), ("a [1] folder", "train", 10),
    ],
)  # fmt: skip
def test_a_folder_gives_the_split_that_was_asked_for(
    folder: Callable[[str], Path], tmp_path: Path, layout: str, split: str, expected: int
) -> None:
    import datasets

    path = folder(layout)
    found = read(path=str(path), split=split)
    assert len(found) == expected
    if "[" in str(path):  # which the library takes for a pattern
        assert found == read(path=str(path / "train.jsonl"))
        return
    cache = str(tmp_path / "cache")
    judge = datasets.load_dataset(str(path), split=split, cache_dir=cache)
    assert found == list(judge["text"])


@pytest.mark.parametrize(
    ("section", "layout", "entry", "expected"),
    [
        pytest.param("datasets", "names", {}, 10, id="train is the default"),
        pytest.param("datasets", "clone", {}, 10, id="and of a clone from the hub"),
        pytest.param("test_datasets", "names", {}, 4, id="test is that of test_datasets"),
        pytest.param("test_datasets", "plain", {}, 10, id="which takes the only split whole"),
        pytest.param("test_datasets", "names", {"split": "validation"}, 3, id="or what is asked"),
        pytest.param("datasets", "card", {"name": "other"}, 4, id="a config of the README"),
        pytest.param("datasets", "names", {"data_files": "test.jsonl"}, 4, id="named files alone"),
        pytest.param(
            "datasets", "names", {"data_files": ["test.jsonl", "train.jsonl"]}, 14,
            id="several named files",
        ),
    ],
)  # fmt: skip
def test_the_default_split_is_axolotls(
    folder: Callable[[str], Path], section: str, layout: str, entry: dict[str, Any], expected: int
) -> None:
    assert len(read(section, path=str(folder(layout)), **entry)) == expected


@pytest.mark.parametrize("split", ["train", "train[:3]", "train[10%:20%]", "test", "test[-1:]"])
@pytest.mark.parametrize("alone", ["train", "test", "train[:5]", None])
def test_a_saved_set_gives_the_split_that_was_asked_for(
    tmp_path: Path, split: str, alone: str | None
) -> None:
    """`alone`: the split that a Dataset was saved from; None for a DatasetDict."""
    import datasets

    sets = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows(name, count)) for name, count in
         {"train": 10, "test": 4}.items()}
    )  # fmt: skip
    name = split.partition("[")[0]
    if alone is None:
        sets.save_to_disk(tmp_path / "saved")
    else:
        kept = datasets.Dataset.from_list(rows(name, 10), split=datasets.Split(alone))
        kept.save_to_disk(tmp_path / "saved")
    if alone is not None and alone.partition("[")[0] != name:
        with pytest.raises(AttnimgError, match=f"no split {name}"):
            read(path=str(tmp_path / "saved"), split=split)
        return
    whole = {name: len(sets[name]) if alone is None else 10}
    (part,) = datasets.ReadInstruction.from_spec(split).to_absolute(whole)
    texts = [record["text"] for record in rows(name, whole[name])]
    assert read(path=str(tmp_path / "saved"), split=split) == texts[part.from_ : part.to]


def test_saved_sets_in_a_folder_are_its_splits(tmp_path: Path) -> None:
    import datasets

    for name, count in (("train", 10), ("test", 4)):
        datasets.Dataset.from_list(rows(name, count)).save_to_disk(tmp_path / name)
    assert len(read(path=str(tmp_path))) == 10
    assert len(read(path=str(tmp_path), split="test")) == 4


def applied(do: str, why: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Edit an entry as the message says, to the letter."""
    if found := edited(do, "datasets[0].path", {"datasets": [dict(entry)]}):
        return dict(found[0]["datasets"][0])
    named = re.search(r"set datasets\[0\]\.(\w+) to one of", do)
    assert named, f"nothing to apply in {do!r}"
    return {**entry, named[1]: re.findall(r"(?:found |\[')(\w+)", why)[0]}


@pytest.mark.parametrize(
    ("layout", "entry", "key", "why"),
    [
        pytest.param("names", {"split": "tset"}, "split", "train", id="a typo"),
        pytest.param("names", {"split": "all"}, "split", "test", id="all is none"),
        pytest.param("text", {"split": "test"}, "split", "validation", id="no such split"),
        pytest.param("names", {"split": "train[:3"}, "split", "Unrecognized", id="no bracket"),
        pytest.param("names", {"split": "train[:300%]"}, "split", "Percent", id="300 percent"),
        pytest.param("names", {"split": "train[5:3]"}, "split", "10 rows", id="an empty slice"),
        pytest.param("names", {"split": "train[50:]"}, "split", "10 rows", id="past the end"),
        pytest.param("names", {"name": "x"}, "name", "no README", id="no configs"),
        pytest.param("card", {"name": "x"}, "name", "other", id="no such config"),
        pytest.param("card", {"name": "other", "split": "test"}, "split", "train",
                     id="a config without the split"),
        pytest.param("names", {"path": "{}/*.jsonl"}, "path", "test.jsonl (test)",
                     id="a pattern that takes the test files too"),
        pytest.param("names", {"data_files": "t*.jsonl"}, "data_files", "test.jsonl (test)",
                     id="a pattern in data_files"),
        pytest.param("names", {"path": "{}/train.jsonl", "split": "test"}, "split", "train",
                     id="the test split of a file"),
    ],
)  # fmt: skip
def test_what_is_no_split_is_refused_with_advice_that_works(
    folder: Callable[[str], Path], layout: str, entry: dict[str, Any], key: str, why: str
) -> None:
    path = folder(layout)
    filled = {"path": str(path), **entry}
    filled["path"] = filled["path"].format(path)
    with pytest.raises(AttnimgError) as caught:
        read(**filled)
    assert caught.value.key == f"datasets[0].{key}"
    assert why in str(caught.value)
    assert read(**applied(caught.value.do, caught.value.why, filled))


def test_a_folder_of_test_files_alone_is_not_trained_on_unasked(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", rows("test", 3))
    with pytest.raises(AttnimgError, match="no split train") as caught:
        read(path=str(tmp_path))
    entry = applied(caught.value.do, caught.value.why, {"path": str(tmp_path)})
    assert len(read(**entry)) == 3


def test_a_file_of_two_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-test.jsonl", rows("x", 3))
    with pytest.raises(AttnimgError, match="belongs to two splits"):
        read(path=str(tmp_path))
    assert len(read(path=str(tmp_path), data_files="train-test.jsonl")) == 3


def test_a_file_without_a_split_beside_others_is_told(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write(tmp_path / name, rows(name, 3))
    config = Config(datasets=[{"path": str(tmp_path), "type": "completion"}])
    (source,), _ = find_sources(config)
    assert [file.path.name for file in source.files] == ["train.jsonl"]
    assert ["more.jsonl" in warning for warning in source.warnings] == [True]
    (tmp_path / "more.jsonl").unlink()
    assert find_sources(config)[0][0].warnings == ()


def test_a_pipe_for_the_configs_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", rows("a", 3))
    os.mkfifo(tmp_path / ".huggingface.yaml")
    with pytest.raises(AttnimgError, match="not a regular file"):
        read(path=str(tmp_path))
    (tmp_path / ".huggingface.yaml").unlink()
    configs = "configs:\n- config_name: a\n  data_files: a.jsonl\n"
    (tmp_path / ".huggingface.yaml").write_text(configs)
    assert len(read(path=str(tmp_path))) == 3


@pytest.mark.parametrize(
    "card",
    [
        pytest.param("configs: [x", id="no YAML"),
        pytest.param("configs: 3", id="no list"),
        pytest.param("configs:\n- config_name: a\n  data_files: no.jsonl", id="no file"),
        pytest.param("configs:\n- config_name: a\n  data_files: ../out.jsonl", id="outside"),
        pytest.param("configs:\n- config_name: a\n  data_files: a.csv\n  sep: ';'", id="options"),
    ],
)
def test_odd_configs_of_a_readme_are_refused(tmp_path: Path, card: str) -> None:
    write(tmp_path / "out.jsonl", rows("out", 3))
    write(tmp_path / "in" / "a.csv", rows("a", 3))
    (tmp_path / "in" / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(AttnimgError, match=r"README.md|outside of it"):
        read(path=str(tmp_path / "in"))
    assert len(read(path=str(tmp_path / "in"), data_files="a.csv")) == 3


def test_looking_at_a_folder_leaves_no_cache(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    before = set((tmp_path).rglob("*")) | set(folder("card").rglob("*"))
    assert len(read(path=str(tmp_path / "card"))) == 10
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "card"}


def cached(cache: Path, files: dict[str, str], *, config: str) -> None:
    """Leave a dataset in the library's cache as a download of someone/data does."""
    from datasets.packaged_modules.json.json import Json

    builder = Json(
        cache_dir=str(cache / "new"),
        dataset_name="data",
        config_name=config,
        data_files=files,
        hash="0123456789abcdef",
    )
    builder.download_and_prepare()
    (prepared,) = (cache / "new" / "data").iterdir()
    (cache / "someone___data").mkdir(exist_ok=True)
    prepared.rename(cache / "someone___data" / config)


def test_a_name_on_the_hub_gives_the_split_that_was_asked_for(
    folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, from the library's cache, as a download leaves it there."""
    path, cache = folder("names"), tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    cached(cache, {n: str(path / f"{n}.jsonl") for n in ("train", "test")}, config="default")
    assert len(read(path="someone/data")) == 10
    assert read(path="someone/data", split="test[:2]") == ["test.jsonl 0", "test.jsonl 1"]
    assert len(read("test_datasets", path="someone/data")) == 4
    with pytest.raises(AttnimgError, match="no split validation") as caught:
        read(path="someone/data", split="validation")
    assert read(**applied(caught.value.do, caught.value.why, {"path": "someone/data"}))
    cached(cache, {"train": str(path / "validation.jsonl")}, config="other")
    for name in ({}, {"name": "no"}):
        with pytest.raises(AttnimgError, match="other") as caught:
            read(path="someone/data", **name)
        assert "set datasets[0].name to one of them" in caught.value.do
    assert len(read(path="someone/data", name="other")) == 3


@pytest.mark.parametrize("damage", ["{", "{}", '{"_data_files": 3}', "[]"])
def test_a_damaged_saved_set_is_read_by_its_files(tmp_path: Path, damage: str) -> None:
    import datasets

    datasets.Dataset.from_list(rows("x", 5)).save_to_disk(tmp_path)
    assert len(read(path=str(tmp_path))) == 5
    (tmp_path / "state.json").write_text(damage)
    with pytest.raises(AttnimgError, match="cannot read the saved dataset") as caught:
        read(path=str(tmp_path))
    entry = applied(caught.value.do, caught.value.why, {"path": str(tmp_path)})
    assert len(read(**entry)) == 5

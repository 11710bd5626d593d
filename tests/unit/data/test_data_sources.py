"""Where records come from: every format, every way to name files, every mistake by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.schema import Config
from attnimg.train.data import check_sources
from attnimg.train.data.check import find_sources
from attnimg.train.data.read import read_source

RECORDS = [{"text": "In the beginning"}, {"text": "was the Word."}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(**entry: Any) -> list[Any]:
    config = Config(datasets=[{"type": "completion", **entry}])
    training, _ = find_sources(config)
    return [(str(place), record["text"]) for place, record in read_source(training[0])]


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        pytest.param("a.jsonl", LINES, "line 1, line 2", id="JSON lines"),
        pytest.param("a.jsonl", b"\n" + LINES, "line 2, line 3", id="blank lines are skipped"),
        pytest.param("a.json", b"\xef\xbb\xbf" + LINES, "line 1, line 2", id="a byte order mark"),
        pytest.param("a.jsonl.gz", gzip.compress(LINES), "line 1, line 2", id="gzip"),
        pytest.param(
            "a.json", json.dumps(RECORDS, indent=1).encode(), "record 1, record 2", id="an array"
        ),
        pytest.param(
            "a.csv", b"text\nIn the beginning\nwas the Word.\n", "record 1, record 2", id="CSV"
        ),
        pytest.param(
            "a.tsv", b"text\tn\nIn the beginning\t1\nwas the Word.\t2\n", "record 1, record 2",
            id="tabs",
        ),
        pytest.param("a.txt", b"In the beginning\nwas the Word.\n", "line 1, line 2", id="text"),
    ],
)  # fmt: skip
def test_each_format_gives_the_same_records(
    tmp_path: Path, name: str, content: bytes, numbers: str
) -> None:
    (tmp_path / name).write_bytes(content)
    places, texts = zip(*read(path=str(tmp_path / name)), strict=True)
    assert list(texts) == [record["text"] for record in RECORDS]
    assert list(places) == [f"{tmp_path / name}, {number}" for number in numbers.split(", ")]


def test_parquet_gives_the_same_records(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    assert [text for _, text in read(path=str(tmp_path / "a.parquet"))] == [
        record["text"] for record in RECORDS
    ]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_larger_than_the_window_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, ensure_ascii: bool
) -> None:
    monkeypatch.setattr("attnimg.train.data.json_records.CHUNK_BYTES", 7)
    records = [{"text": f"é {number}" * number, "n": number} for number in range(1, 40)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ensure_ascii))
    assert [text for _, text in read(path=str(path))] == [record["text"] for record in records]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        pytest.param({"path": "{}"}, 4, id="a folder, all its files in order"),
        pytest.param({"path": "{}/*.jsonl"}, 4, id="a pattern"),
        pytest.param({"path": "{}", "data_files": "b.jsonl"}, 2, id="a file of a folder"),
        pytest.param({"path": "json", "data_files": ["{}/a.jsonl"]}, 2, id="a builder and files"),
        pytest.param({"path": "{}/a.jsonl", "split": "train"}, 2, id="the split train"),
        pytest.param({"path": "{}", "split": "train[1:3]"}, 2, id="a slice by number"),
        pytest.param({"path": "{}", "split": "train[:25%]"}, 1, id="a slice by percent"),
    ],
)
def test_files_are_found(tmp_path: Path, entry: dict[str, Any], expected: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    (tmp_path / "README.md").write_text("not data")
    filled = json.loads(json.dumps(entry).replace("{}", str(tmp_path)))
    assert len(read(**filled)) == expected


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    assert len(read(path=str(tmp_path / "saved"))) == 2


@pytest.mark.parametrize(
    ("name", "content", "code", "names"),
    [
        pytest.param("a.jsonl", b"", "empty-dataset", "no record", id="an empty file"),
        pytest.param("a.json", b"[]", "empty-dataset", "no record", id="an empty array"),
        pytest.param(
            "a.jsonl", LINES + b'{"text": "x"\n', "bad-data", "line 3", id="broken JSON on line 3"
        ),
        pytest.param(
            "a.jsonl", LINES + b'{"text": "\xff"}', "bad-data", "line 3", id="a byte, not UTF-8"
        ),
        pytest.param("a.jsonl", b"[1, 2]", "bad-data", "record 1", id="an array of numbers"),
        pytest.param("a.jsonl", b'"x"\n', "bad-data", "found a string", id="a line, not an object"),
        pytest.param(
            "a.json", b'[{"text": "x"}, {"text": ]', "bad-data", "record 2", id="a broken array"
        ),
        pytest.param(
            "a.json", b'[{"text": "x"}', "bad-data", "end of the file", id="an array cut off"
        ),
        pytest.param(
            "a.json", b'[{"text": "x"} {"text": "y"}]', "bad-data", "after record 1",
            id="a comma missing",
        ),
        pytest.param(
            "a.json", b'[{"text": "x"}] x', "bad-data", "more text", id="text after the array"
        ),
        pytest.param("a.parquet", b"PAR", "bad-data", "not Parquet", id="no Parquet"),
        pytest.param("a.jsonl.gz", LINES, "bad-data", "a.jsonl.gz", id="no gzip"),
        pytest.param("a.csv", b"text,n\nx,1,2\n", "bad-data", "3 fields", id="a field too many"),
        pytest.param("a.csv", b'text\n"x', "bad-data", "not CSV", id="a quote left open"),
        pytest.param(
            "a.jsonl", b'{"body": "x"}\n', "wrong-columns", "found the columns body; needed text",
            id="another column",
        ),
        pytest.param("a.jsonl", b'{"text": 3}\n', "bad-data", "text is 3", id="a number for text"),
        pytest.param("a.xyz", LINES, "bad-value", "ds_type", id="a format nobody knows"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes, code: str, names: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AttnimgError) as caught:
        read(path=str(tmp_path / name))
    assert caught.value.code == code
    assert names in str(caught.value)
    assert name in str(caught.value)
    assert str(caught.value.key).startswith("datasets[0].")


@pytest.mark.parametrize(
    ("entry", "code", "key"),
    [
        pytest.param({"path": "no.jsonl"}, "file-missing", "datasets[0].path", id="no file"),
        pytest.param({"path": "./no"}, "file-missing", "datasets[0].path", id="no folder"),
        pytest.param({"path": "no/*.jsonl"}, "file-missing", "datasets[0].path", id="no match"),
        pytest.param({"path": "."}, "file-missing", "datasets[0].path", id="a folder without data"),
        pytest.param(
            {"path": "json", "data_files": "no.jsonl"}, "file-missing", "datasets[0].path",
            id="no data_files",
        ),
        pytest.param(
            {"path": "x", "type": None}, "missing-key", "datasets[0].type", id="no type"
        ),
        pytest.param(
            {"path": "x", "type": "alpacca"}, "bad-value", "datasets[0].type", id="a typo"
        ),
        pytest.param(
            {"path": "../data.jsonl", "split": "test"}, "bad-value", "datasets[0].split",
            id="a split that local files lack",
        ),
        pytest.param({"path": "../mixed"}, "bad-value", "datasets[0].ds_type", id="mixed formats"),
    ],
)  # fmt: skip
def test_mistakes_in_an_entry_are_refused_by_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], code: str, key: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "data.jsonl").write_bytes(LINES)
    (tmp_path / "mixed" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "mixed" / "b.txt").write_bytes(LINES)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(AttnimgError) as caught:
        read(**{"type": "completion", **entry})
    assert (caught.value.code, caught.value.key) == (code, key)


@pytest.mark.parametrize(
    ("keys", "code", "key"),
    [
        pytest.param({}, "missing-key", "datasets", id="no dataset at all"),
        pytest.param(
            {"val_set_size": 0.1, "test_datasets": True}, "bad-value", "val_set_size",
            id="val_set_size and test_datasets",
        ),
        pytest.param(
            {"default_system_message": "Be brief.", "datasets": True}, "bad-value",
            "default_system_message", id="a system message without conversations",
        ),
    ],
)  # fmt: skip
def test_keys_that_contradict_are_refused(
    tmp_path: Path, keys: dict[str, Any], code: str, key: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    entry = [{"path": str(tmp_path / "a.jsonl"), "type": "completion"}]
    filled = {name: entry if value is True else value for name, value in keys.items()}
    if "test_datasets" in filled:
        filled["datasets"] = entry
    with pytest.raises(AttnimgError) as caught:
        check_sources(Config(**filled))
    assert (caught.value.code, caught.value.key) == (code, key)


def test_a_hub_name_without_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(AttnimgError) as caught:
        read(path="nobody/no-such-dataset")
    assert caught.value.code == "file-missing"
    assert "HF_HUB_OFFLINE" in str(caught.value)


def test_a_pretraining_dataset_needs_no_type(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    training, _ = find_sources(Config(pretraining_dataset=[{"path": str(tmp_path / "a.jsonl")}]))
    assert [(source.key, source.spec.type) for source in training] == [
        ("pretraining_dataset[0]", "pretrain")
    ]


@pytest.mark.parametrize(
    ("type", "advice"),
    [
        pytest.param("alpacca", "datasets[0].type: alpaca", id="a typo"),
        pytest.param("sharegpt", "chat_template for conversations", id="another tool's name"),
        pytest.param("alpaca", "datasets[0].type: completion", id="columns of another type"),
    ],
)
def test_the_type_that_fits_is_suggested(tmp_path: Path, type: str, advice: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(AttnimgError) as caught:
        read(path=str(tmp_path / "a.jsonl"), type=type)
    assert advice in caught.value.do

"""Where records come from: every format, every way to name files, every mistake by name."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import find_sources, sources
from attnimg.train.data.sources import read_source

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


def arrow_file(path: Path, records: list[dict[str, str]], *, stream: bool) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(records)
    make = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with make(path, table.schema) as file:
        file.write_table(table)


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
            {"path": "../data.jsonl", "type": None}, "missing-key", "datasets[0].type", id="no type"
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


@pytest.mark.parametrize("type", ["alpaca", "jeopardy", {"field_instruction": "ask"}, None])
def test_the_type_that_fits_is_suggested(tmp_path: Path, type: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    with pytest.raises(AttnimgError) as caught:
        read(path=str(tmp_path / "a.jsonl"), type=type)
    assert "datasets[0].type: completion" in caught.value.do


@pytest.mark.parametrize("place", ["path", "data_files", "folder", "saved"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.timeout(20)
def test_only_regular_files_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    """A pipe would wait for ever, a device may never end."""
    folder = tmp_path / "d"
    if place == "saved":
        import datasets

        datasets.Dataset.from_list(RECORDS).save_to_disk(folder)
        assert len(read(path=str(folder))) == 2
        odd = folder / "state.json"
        odd.unlink()
    else:
        folder.mkdir()
        odd = folder / "a.jsonl"
    with socket.socket(socket.AF_UNIX) as opened:
        if kind == "pipe":
            os.mkfifo(odd)
        elif kind == "socket":
            monkeypatch.chdir(folder)  # a socket's path has 108 characters at most
            opened.bind(odd.name)
        else:
            odd.symlink_to("/dev/zero")
        entry = {"path": str(folder)} if place in ("folder", "saved") else {"path": str(odd)}
        if place == "data_files":
            entry = {"path": str(folder), "data_files": "a.jsonl"}
        with pytest.raises(AttnimgError) as caught:
            read(**entry)
    assert ("no data" if place == "folder" else "not a regular file") in caught.value.what
    if place != "saved":
        odd.unlink()
        odd.write_bytes(LINES)
        assert len(read(**entry)) == 2


def test_a_link_to_a_file_is_read(tmp_path: Path) -> None:
    """As in the hub's cache, whose files are links to blobs."""
    (tmp_path / "blob").write_bytes(LINES)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").symlink_to(tmp_path / "blob")
    assert len(read(path=str(tmp_path / "d"))) == 2


@pytest.mark.parametrize("declared", [True, False])
def test_an_archive_is_refused_by_the_command_that_unpacks_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    entry = {"path": str(tmp_path / "a.zip")} | ({"ds_type": "json"} if declared else {})
    with pytest.raises(AttnimgError, match="cannot read") as caught:
        read(**entry)
    command = caught.value.do.split("`")[1]
    assert command == f"unzip {tmp_path / 'a.zip'}"
    with zipfile.ZipFile(shlex.split(command)[1]) as archive:  # unzip itself may be missing
        archive.extractall(tmp_path)
    assert len(read(path=str(tmp_path / "a.jsonl"))) == 2


def test_a_pointer_of_git_lfs_is_refused_by_the_command_that_downloads(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (tmp_path / "train.parquet").write_bytes(pointer)
    with pytest.raises(AttnimgError, match="not downloaded") as caught:
        read(path=str(tmp_path))
    assert caught.value.do == f"git -C {tmp_path} lfs pull"
    parquet(tmp_path / "train.parquet")
    assert len(read(path=str(tmp_path))) == 2


def test_a_file_below_nobody_s_home_is_refused() -> None:
    with pytest.raises(AttnimgError) as caught:
        read(path="~no-such-user")
    assert caught.value.key == "datasets[0].path"


def test_chmod_makes_a_forbidden_file_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every file is readable, so access is asked of the file's mode."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    if os.geteuid() == 0:
        monkeypatch.setattr("os.access", lambda path, _: bool(Path(path).stat().st_mode & 0o444))
    with pytest.raises(AttnimgError, match="no permission") as caught:
        read(path=str(tmp_path / "a.jsonl"))
    subprocess.run(shlex.split(caught.value.do), check=True)
    assert len(read(path=str(tmp_path / "a.jsonl"))) == 2


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        pytest.param("a.xyz", {"ds_type": "json"}, id="a format nobody knows"),
        pytest.param("mixed", {"ds_type": "json"}, id="a folder of two formats"),
        pytest.param("mixed", {"data_files": "a.jsonl"}, id="or by its files"),
        pytest.param("b.json", {"ds_type": "parquet"}, id="Parquet by another name"),
        pytest.param("b.dat", {"ds_type": "parquet"}, id="Parquet by no name"),
        pytest.param("saved", {"ds_type": "arrow"}, id="Arrow by another name"),
        pytest.param("a.parquet", {"ds_type": "json"}, id="lines by another name"),
    ],
)
def test_naming_the_format_is_enough(tmp_path: Path, name: str, edit: dict[str, str]) -> None:
    (tmp_path / "a.xyz").write_bytes(LINES)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.jsonl").write_bytes(LINES)
    (tmp_path / "mixed" / "b.txt").write_bytes(LINES)
    (tmp_path / "a.parquet").write_bytes(LINES)
    parquet(tmp_path / "b.json")
    parquet(tmp_path / "b.dat")
    arrow_file(tmp_path / "saved", RECORDS, stream=False)
    with pytest.raises(AttnimgError) as caught:
        read(path=str(tmp_path / name))
    for key in edit:
        assert f"datasets[0].{key}" in caught.value.do
    assert len(read(path=str(tmp_path / name), **edit)) == 2


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        pytest.param({"path": "/"}, "path", id="all of the machine"),
        pytest.param({"path": "/**/*.jsonl"}, "path", id="a pattern over all of it"),
        pytest.param({"path": "/tmp", "data_files": ["/usr/**/*.jsonl"]}, "data_files",
                     id="a pattern of data_files"),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_one_of_data_is_refused_before_all_of_it_is_searched(
    entry: dict[str, Any], named: str
) -> None:
    began = time.process_time()
    with pytest.raises(AttnimgError, match="too many files that are not data") as caught:
        read(**entry)
    assert time.process_time() - began < 5
    assert (caught.value.code, caught.value.key) == ("bad-data", f"datasets[0].{named}")
    assert caught.value.do.startswith("name the file in datasets[0].path, ")


def test_a_folder_of_many_data_files_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MAX_OTHER_FILES", 3)
    (tmp_path / ".cache").mkdir()
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(LINES)
        (tmp_path / ".cache" / f"{number}.metadata").touch()
    (tmp_path / "README.txt.md").touch()
    assert len(read(path=str(tmp_path))) == 12
    assert len(read(path=f"{tmp_path}/**/*.jsonl")) == 12
    # What the refusal says to do helps in a folder with other files.
    for number in range(6):
        (tmp_path / f"{number}.png").touch()
    with pytest.raises(AttnimgError, match="too many files"):
        read(path=str(tmp_path))
    assert len(read(path=str(tmp_path), data_files=["0.jsonl"])) == 2
    assert len(read(path=str(tmp_path / "0.jsonl"))) == 2

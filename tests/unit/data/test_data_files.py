"""What a data file holds: each format gives the same records, each fault is named by its place."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import find_sources
from attnimg.train.data.records import LocalFile, read_records
from attnimg.train.data.sources import read_source

RECORDS = [{"text": "In the beginning"}, {"text": "was the Word."}]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ZSTD = zstandard.compress(LINES)
# An object around the records, in the forms that tools write.
WRAPPED = {
    "data": {"data": RECORDS},
    "the only list of objects": {"version": "1.0", "n": [1, 2], "rows": RECORDS, "end": None},
    "beside an empty list": {"errors": [], "train": RECORDS},
}


def read(**entry: Any) -> list[Any]:
    config = Config(datasets=[{"type": "completion", **entry}])
    training, _ = find_sources(config)
    return [(str(place), record["text"]) for place, record in read_source(training[0])]


def flipped(content: bytes) -> bytes:
    """Flip a bit in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


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
    ("name", "content", "numbers"),
    [
        pytest.param("a.jsonl", LINES, "line 1, line 2", id="JSON lines"),
        pytest.param("a.jsonl", b"\n" + LINES, "line 2, line 3", id="blank lines are skipped"),
        pytest.param("a.json", b"\xef\xbb\xbf" + LINES, "line 1, line 2", id="a byte order mark"),
        pytest.param("a.jsonl.gz", gzip.compress(LINES), "line 1, line 2", id="gzip"),
        pytest.param("a.jsonl.zst", ZSTD, "line 1, line 2", id="zstd"),
        pytest.param("a.jsonl.zst", zstandard.compress(LINES[:29]) + zstandard.compress(LINES[29:]),
                     "line 1, line 2", id="zstd in two frames"),
        pytest.param("a.jsonl.xz", lzma.compress(LINES), "line 1, line 2", id="xz"),
        pytest.param("a.jsonl.bz2", bz2.compress(LINES), "line 1, line 2", id="bzip2"),
        pytest.param("a.jsonl", ZSTD, "line 1, line 2", id="zstd by another name"),
        pytest.param("a.jsonl.gz", LINES, "line 1, line 2", id="gzip that a download unpacked"),
        pytest.param("a.txt.zst", zstandard.compress(b"In the beginning\nwas the Word.\n"),
                     "line 1, line 2", id="text in zstd"),
        pytest.param("a.csv.xz", lzma.compress(b"text\nIn the beginning\nwas the Word.\n"),
                     "record 1, record 2", id="CSV in xz"),
        pytest.param(
            "a.json", json.dumps(RECORDS, indent=1).encode(), "record 1, record 2", id="an array"
        ),
        *(
            pytest.param("a.json", json.dumps(value, indent=indent).encode() + end,
                         "record 1, record 2", id=f"{what}, indent {indent}")
            for indent in (None, 1)
            for end in (b"", b"\n")
            for what, value in WRAPPED.items()
        ),
        pytest.param("a.json", b"\n".join(json.dumps(r, indent=1).encode() for r in RECORDS),
                     "record 1, record 2", id="objects over several lines"),
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
        pytest.param("a.jsonl.gz", gzip.compress(LINES)[:-9], "bad-data", "cut off",
                     id="half gzip"),
        pytest.param("a.jsonl.gz", flipped(gzip.compress(LINES)), "bad-data", "damaged",
                     id="a flipped bit in gzip"),
        pytest.param("a.jsonl.xz", lzma.compress(LINES)[:-9], "bad-data", "cut off", id="half xz"),
        pytest.param("a.jsonl.xz", flipped(lzma.compress(LINES)), "bad-data", "damaged",
                     id="a flipped bit in xz"),
        pytest.param("a.jsonl.bz2", flipped(bz2.compress(LINES)), "bad-data", "damaged",
                     id="a flipped bit in bzip2"),
        pytest.param("a.jsonl.zst", ZSTD[:-3], "bad-data", "cut off", id="half zstd"),
        pytest.param("a.csv.gz", gzip.compress(b"text\nx\n")[:-9], "bad-data", "cut off",
                     id="half CSV"),
        pytest.param("a.txt.gz", gzip.compress(LINES)[:-9], "bad-data", "cut off", id="half text"),
        pytest.param("a.arrow", LINES, "bad-data", "not Arrow", id="no Arrow"),
        pytest.param("a.tar.gz", gzip.compress(LINES), "bad-data", "tar -xf", id="a tar archive"),
        pytest.param("a.csv", b"text,text\nx,y\n", "bad-data", "text twice", id="a column twice"),
        pytest.param("a.csv", "text\né\n".encode("latin1"), "bad-data", "iconv",
                     id="CSV in Latin 1"),
        pytest.param("a.txt", "é\n".encode("latin1"), "bad-data", "iconv", id="text in Latin 1"),
        pytest.param("a.json", '[{"text": "é"}]'.encode("latin1"), "bad-data", "iconv",
                     id="an array in Latin 1"),
        pytest.param("a.jsonl", '{"text": "é"}'.encode("utf-16"), "bad-data", "iconv",
                     id="JSON lines in UTF-16"),
        pytest.param(
            "a.json", json.dumps({"train": RECORDS, "test": RECORDS}, indent=1).encode(),
            "bad-data", "'train' and also 'test'", id="two lists of records in an object",
        ),
        pytest.param("a.json", b'{"data": [{"text": "x"}', "bad-data", "line 1",
                     id="an object cut off"),
        pytest.param("a.json", b'{"data": []}', "empty-dataset", "no record", id="no data"),
        pytest.param("a.json", b'{"text": "x"\n{"text": "y"}', "bad-data", "line 1",
                     id="broken JSON on line 1"),
        pytest.param("a.jsonl", LINES + b"[" * 50_000, "bad-data", "line 3", id="too deep"),
        pytest.param("a.json", b"[" * 50_000, "bad-data", "nested too deep",
                     id="an array too deep"),
        pytest.param("a.jsonl", LINES + b'{"text": ' + b"1" * 5000 + b"}", "bad-data", "line 3",
                     id="5,000 digits"),
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


@pytest.mark.parametrize("stream", [True, False])
def test_both_kinds_of_arrow_files_are_read(tmp_path: Path, stream: bool) -> None:
    arrow_file(tmp_path / "a.arrow", RECORDS * 1500, stream=stream)
    found = read(path=str(tmp_path / "a.arrow"))
    assert [text for _, text in found] == [record["text"] for record in RECORDS * 1500]
    assert found[-1][0].endswith("record 3000")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_conversation_is_a_record_not_a_list_of_records(
    tmp_path: Path, indent: int | None
) -> None:
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.json").write_text(json.dumps(talk, indent=indent))
    config = Config(datasets=[{"path": str(tmp_path / "a.json"), "type": "chat_template"}])
    assert [record for _, record in read_source(find_sources(config)[0][0])] == [talk]
    named = {"id": 7, "talk": talk["messages"]}
    (tmp_path / "a.json").write_text(json.dumps(named, indent=indent))
    with pytest.raises(AttnimgError, match="found the columns id, talk"):
        find_sources(config)
    entry = {**config.datasets[0].model_dump(exclude_none=True), "field_messages": "talk"}
    source = find_sources(Config(datasets=[entry]))[0][0]
    assert [record for _, record in read_source(source)] == [named]


def test_a_list_of_objects_before_the_text_is_the_records_own(tmp_path: Path) -> None:
    records = [{"tags": [{"text": "not this"}], "text": "The Word."}] * 2
    (tmp_path / "a.json").write_text("\n".join(json.dumps(r, indent=1) for r in records))
    assert [text for _, text in read(path=str(tmp_path / "a.json"))] == ["The Word."] * 2


def test_a_number_is_whole_wherever_a_chunk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"n": [-2.5, 1.5e-7, 12345], "text": "x"}] * 3
    (tmp_path / "a.json").write_text(json.dumps(records))
    file = LocalFile(path=tmp_path / "a.json", format="json", columns=frozenset({"text"}))
    for size in range(1, 40):
        monkeypatch.setattr("attnimg.train.data.json_records.CHUNK_BYTES", size)
        assert [record for _, record in read_records(file, key="datasets[0]")] == records


def test_objects_one_after_another_may_hold_lists_of_objects(tmp_path: Path) -> None:
    records = [{"tags": [{"a": 1}], "body": "The Word."}] * 2
    for between, indent in ((" ", None), ("\n", 1)):
        (tmp_path / "a.json").write_text(
            between.join(json.dumps(r, indent=indent) for r in records)
        )
        file = LocalFile(path=tmp_path / "a.json", format="json", columns=frozenset({"text"}))
        assert [record for _, record in read_records(file, key="datasets[0]")] == records


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_record_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in ("json_records", "records"):
        monkeypatch.setattr(f"attnimg.train.data.{module}.LIMIT_BYTES", 1000)
    monkeypatch.setattr("attnimg.train.data.json_records.CHUNK_BYTES", 100)
    content = {
        "a.jsonl": LINES + b'{"text": "' + b"x" * 2000,
        "a.json": b'[{"text": "x"}, {"text": "' + b"x" * 2000,
        "a.csv": b"text\nx\n" + b"x" * 2000,
        "a.txt": b"x\n" + b"x" * 2000,
    }
    (tmp_path / name).write_bytes(content[name])
    with pytest.raises(AttnimgError, match="cannot read") as caught:
        read(path=str(tmp_path / name))
    assert "split it into several records" in caught.value.do
    (tmp_path / name).write_bytes(content[name][:-1500] + (b'"}' if "js" in name else b""))
    if name == "a.json":
        (tmp_path / name).write_bytes(content[name][:-1500] + b'"}]')
    assert len(read(path=str(tmp_path / name))) > 1


def test_a_date_past_9999_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    for year, works in ((2000, True), (12000, False)):
        days = (year - 1970) * 366
        date = pyarrow.array([days], pyarrow.int32()).cast(pyarrow.date32())
        table = pyarrow.table({"text": ["x"], "date": date})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        if works:
            assert len(read(path=str(tmp_path / "a.parquet"))) == 1
        else:
            with pytest.raises(AttnimgError, match="cannot read") as caught:
                read(path=str(tmp_path / "a.parquet"))
            assert "write that column as text" in caught.value.do

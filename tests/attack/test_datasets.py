"""Attack with data sets: damaged files of each format, odd records, and what is no file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from attacked import Outcome
from damages import KINDS, put
from generated import DAMAGES, ODD, Damage, try_cases
from hypothesis import strategies as st

TALK = {"messages": [{"role": "user", "content": "Is it?"},
                     {"role": "assistant", "content": "Yes."}]}  # fmt: skip
TEXT, ALPACA = {"text": "The king spoke."}, {"instruction": "Is it?", "output": "Yes."}
RECORDS = {"completion": TEXT, "alpaca": ALPACA, "chat_template": TALK, "pretrain": TEXT}
ENTRIES: list[dict[str, Any]] = [
    {}, {}, {}, {"split": "train[:50%]"}, {"ds_type": "json"}, {"ds_type": "parquet"},
    {"field": "text"}, {"field_messages": "messages"}, {"train_on_eos": "all"},
]  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def table(rows: list[dict[str, Any]], kind: str) -> bytes:
    written, made = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(made, written)
    else:
        with pyarrow.ipc.new_stream(written, made.schema) as stream:
            stream.write_table(made)
    return written.getvalue()


def forty(kind: str) -> list[dict[str, Any]]:
    return [RECORDS[kind]] * 40


def files(rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """The same rows in each format, by the file's name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    found = {
        "d.jsonl": lines, "d.json": json.dumps(rows).encode(),
        "d.jsonl.gz": gzip.compress(lines, mtime=0),
        "d.jsonl.xz": lzma.compress(lines), "d.jsonl.bz2": bz2.compress(lines),
        "d.parquet": table(rows, "parquet"), "d.arrow": table(rows, "arrow"), "d.txt": lines,
    }  # fmt: skip
    if all(isinstance(value, str) for row in rows for value in row.values()):
        found["d.csv"] = "".join(
            f"{','.join(row)}\n{','.join(str(v) for v in row.values())}\n" for row in rows[:1]
        ).encode()
    return found


@st.composite
def odd_record(draw: st.DrawFn, kind: str) -> Any:
    """A record with an odd value somewhere in it."""
    record = json.loads(json.dumps(RECORDS[kind]))
    odd = draw(ODD)
    if kind != "chat_template" or draw(st.integers(0, 2)) == 0:
        return draw(st.sampled_from([odd, {**record, draw(st.sampled_from(sorted(record))): odd}]))
    message = draw(st.sampled_from(record["messages"]))
    keys = ["role", "content", "tool_calls", "name", "train", "weight", "reasoning_content"]
    key = draw(st.sampled_from(keys))
    message[key] = odd
    return record


def test_data_sets(
    train: Callable[..., Outcome],
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    @st.composite
    def cases(draw: st.DrawFn) -> tuple[str, str, bytes | str | Damage, dict[str, Any]]:
        kind = draw(st.sampled_from(sorted(RECORDS)))
        entry = draw(st.sampled_from(ENTRIES))
        if draw(st.integers(0, 9)) == 0:
            name = draw(st.sampled_from(["d.jsonl", "d.parquet", "d.csv", "d"]))
            return kind, name, draw(st.sampled_from(KINDS)), entry
        if draw(st.booleans()):
            record = draw(odd_record(kind))
            lines = "".join(
                json.dumps(row) + "\n" for row in [*forty(kind)[:3], record, *forty(kind)]
            )
            return kind, "d.jsonl", lines.encode(errors="surrogatepass"), entry
        name = draw(st.sampled_from(sorted(files(forty(kind)))))
        return kind, name, draw(DAMAGES), entry

    def judge(case: tuple[str, str, bytes | str | Damage, dict[str, Any]]) -> str:
        kind, name, content, entry = case
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if isinstance(content, Damage):
            content = content.of(files(forty(kind))[name])
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            put(tmp_path / name, content)
        template = {"chat_template_jinja": TEMPLATE} if kind == "chat_template" else {}
        data = [{"path": str(tmp_path / name), "type": kind, **entry}]
        return train(tmp_path, datasets=data, **template).fault_with_text

    try_cases("data sets", cases(), judge, record=record_property, count=12)


def test_right_data_of_each_format_is_trained_on(
    train: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name in ("d.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(files([TEXT] * 40)[name])
        outcome = train(datasets=[{"path": str(tmp_path / name), "type": "completion"}])
        assert (outcome.code, outcome.fault) == (0, ""), outcome.err

"""Test reading, rows and batches on random records that hypothesis generates.

What is learnt is what the records say, in whatever way the documents were read, kept or packed.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import zstandard
from chat_labels import PLACE, tokenizer
from data_strategies import any_text, examples, texts
from hypothesis import given
from hypothesis import strategies as st

from attnimg.config.schema import Config, DatasetSpec
from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.train.data import find_sources, load_documents
from attnimg.train.data.chat import ChatEncoder
from attnimg.train.data.conversations import parse_turns
from attnimg.train.data.sources import read_source
from attnimg.train.data.types import PairEncoder, choose_parser
from attnimg.train.rows import make_rows

Draw = Callable[[st.SearchStrategy[Any]], Any]

# Its own tokens are special ones, so that no token is the template's and the record's.
TEMPLATE = (
    "{% for m in messages %}<|im_start|><|{{ m.role }}|>"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|assistant|>{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")
TOKENS = (*(f"<|{role}|>" for role in ROLES), "<|im_start|>", "<|im_end|>", "<think>", "</think>")
WORDS = ("Yes", "a", "s", "\u4f60\u597d", "e\u0301te", "<|im_end|>", "<|user|>", "</s>", "{{a}}")


@st.composite
def flagged_conversations(draw: Draw) -> list[dict[str, Any]]:
    """Conversations of any roles, with flags, reasoning, parts and blank contents."""
    turns: list[dict[str, Any]] = []
    text = texts(WORDS) | st.sampled_from(["", " ", "\n\n"])
    for role in draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=6)):
        turn: dict[str, Any] = {"role": role, "content": draw(text)}
        if draw(st.booleans()):  # no token belongs to two parts
            turn["content"] = [
                {"type": "text", "text": part + "</s>"}
                | draw(st.sampled_from([{}, {"train": False}]))
                for part in draw(st.lists(text, min_size=1, max_size=3))
            ]
        key, flag = draw(st.sampled_from(["train", "weight", "training"])), draw(st.integers(-1, 1))
        if flag >= 0:
            turn[key] = flag if key == "weight" else bool(flag)
        if role == "assistant" and draw(st.integers(0, 3)) == 0:
            turn["reasoning_content"] = draw(texts(WORDS).filter(lambda t: "</think>" not in t))
        turns.append(turn)
    return turns


def said(turns: list[dict[str, Any]], roles: set[str], mode: str) -> str:
    """Return the trained texts of these turns, by the rules of the documentation."""
    pieces, ends = list[str](), list[tuple[int, bool]]()
    for turn in turns:
        given = turn["content"]
        parts = given if isinstance(given, list) else [{"text": given}]
        reasoning = turn.get("reasoning_content", "")
        flags = [turn[key] for key in ("train", "training") if key in turn]
        trained = flags[0] if flags else turn["role"] in roles and turn.get("weight") != 0
        blank = not "".join(part["text"] for part in parts).strip()
        if answer := bool(trained and not (blank and not reasoning)):
            pieces.append(f"<think>{reasoning}</think>" if reasoning else "")
            pieces += [p["text"] for p in parts if p.get("train", True)]
        if answer or not blank:
            ends.append((len(pieces), answer))
            pieces.append("")
    answered = [place for place, answer in ends if answer]
    ended = {"all": [place for place, _ in ends], "turn": answered, "last": answered[-1:]}
    for place in ended.get(mode, ()):
        pieces[place] = "<|im_end|>"
    return "".join(pieces)


@examples(150)
@given(
    flagged_conversations(), st.sets(st.sampled_from(ROLES), min_size=1),
    st.sampled_from(["turn", "all", "last", "none"]), st.sampled_from(["byte-level", "metaspace"]),
)  # fmt: skip
def test_flags_roles_parts_and_reasoning_are_followed(
    turns: list[dict[str, Any]], roles: set[str], mode: Any, tokens: str
) -> None:
    spec = DatasetSpec(path="data.jsonl", type="chat_template", roles_to_train=sorted(roles))
    encode = ChatEncoder(
        tokenizer(tokens, (*TOKENS, TEMPLATE)), TEMPLATE, train_on_eos=mode,
        trained_roles=frozenset(roles), eot_tokens=("<|im_end|>",),
    )  # fmt: skip
    parsed = parse_turns(spec, {"messages": turns}, PLACE)
    want = said(turns, roles, mode)
    if parsed is None:
        assert not said(turns, roles, "none").strip()
        return
    ((ids, labels),) = encode([(PLACE, parsed)])
    del ids
    found = encode.tokenizer.decode([label for label in labels if label != -100])
    assert found.replace("\u2581", " ") == want.replace("\u2581", " ")


@examples(60)
@given(st.lists(st.tuples(texts(), texts()), min_size=1, max_size=4))
def test_an_alpaca_answer_and_its_end_are_trained(pairs: list[tuple[str, str]]) -> None:
    parse = choose_parser(DatasetSpec(path="data.jsonl", type="alpaca"))
    records = [{"instruction": asked, "output": answered} for asked, answered in pairs]
    batch = [(PLACE, parse(record, PLACE)) for record in records]
    encode = PairEncoder(tokenizer("byte-level", ()), train_on_inputs=False)
    for (ids, labels), (asked, answered) in zip(encode(batch), pairs, strict=True):
        trained = [label for label in labels if label != -100]
        assert ids[-len(trained) :] == trained
        assert encode.tokenizer.decode(trained) == answered.removesuffix("</s>") + "</s>"
        assert encode.tokenizer.decode(ids[: -len(trained)]).endswith(
            f"### Instruction:\n{asked}\n\n### Response:\n"
        )


@examples(80)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9),
             min_size=1, max_size=12),
    st.booleans(), st.booleans(), st.integers(1, 5),
)  # fmt: skip
def test_packed_rows_hold_the_documents_that_stand_apart(
    drawn: list[list[tuple[int, bool]]], padding_free: bool, fixed: bool, batch_size: int
) -> None:
    import datasets

    documents = [
        ([token for token, _ in row], [token if trained else -100 for token, trained in row])
        for row in drawn
    ]
    rows = make_rows(
        datasets.Dataset.from_dict(
            {"input_ids": [ids for ids, _ in documents], "labels": [own for _, own in documents]}
        ),
        Config(sequence_len=9, pad_to_sequence_len=fixed),
        packed=True, pad_token_id=0,
        context=RunContext(
            dtype="float32", autocast=None, packing=True, padding_free=padding_free,
            rows=batch_size, sequence_len=9, compiled=False, checkpointing=False, seq_idx=True,
        ),
    )  # fmt: skip
    found, whole = Counter[Any](), list(rows.dataset)
    for start in range(0, len(whole), batch_size):
        batch = rows.collate(whole[start : start + batch_size])
        columns = [
            batch[name].flatten().tolist()
            for name in ("input_ids", "labels", "position_ids", "seq_idx")
        ]
        begun = [at for at, position in enumerate(columns[2]) if position == 0]
        for first, after in zip(begun, [*begun[1:], len(columns[2])], strict=True):
            ids, labels, positions, numbers = (column[first:after] for column in columns)
            assert positions == list(range(after - first))
            assert len(set(numbers)) == 1
            found[tuple(ids), tuple(labels)] += 1
    # A document's first token has nothing before it, so that its label is never used.
    wanted = Counter((tuple(ids), (-100, *own[1:])) for ids, own in documents)
    padding = found - wanted
    assert not wanted - found
    assert all(set(ids) == {0} and set(labels) == {-100} for ids, labels in padding)


def write(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnimg.train.data.prepare.BATCH_RECORDS", 7)


RECORDS = {
    "completion": st.builds(dict, text=texts()),
    "alpaca": st.builds(dict, instruction=any_text, output=texts()),
    "chat_template": st.builds(dict, messages=flagged_conversations()),
}


@st.composite
def runs(draw: Draw) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Generate a type, records of it, and keys that control how they are read."""
    kind = draw(st.sampled_from(sorted(RECORDS)))
    # The last one is never dropped.
    last = {"text": "x", "instruction": "", "output": "x", "messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}  # fmt: skip
    records = [*draw(st.lists(RECORDS[kind], min_size=20, max_size=40)), last, last, last]
    choices = {
        "sequence_len": (175, 256), "val_set_size": (0, 0.2, 2), "train_on_inputs": (True, False),
        "excess_length_strategy": (None, "truncate"), "shuffle_merged_datasets": (True, False),
        "spec_split": (None, "train[5:]"), "seed": (1, 2),
    }  # fmt: skip
    return kind, records, {key: draw(st.sampled_from(of)) for key, of in choices.items()}


def same(one: Any, other: Any) -> None:
    assert other.train.to_dict() == one.train.to_dict()
    assert other.warnings == one.warnings
    assert other.figures[0].content == one.figures[0].content
    assert (other.validation is None) == (one.validation is None)
    assert one.validation is None or other.validation.to_dict() == one.validation.to_dict()


@examples(8)
@given(runs())
@pytest.mark.usefixtures("small_batches")
def test_kept_documents_are_those_prepared_in_memory(
    run_on: Any, tmp_path_factory: pytest.TempPathFactory, drawn: Any
) -> None:
    kind, records, keys = drawn
    folder = tmp_path_factory.mktemp("kept")
    path, tokens = write(folder / "data.jsonl", records), tokenizer("byte-level", TOKENS)
    keys = {"chat_template_jinja": TEMPLATE, **keys}
    kept = keys | {"dataset_prepared_path": str(folder / "prepared")}
    alone, miss, hit = (
        load_documents(run_on(path, kind, **chosen), tokens) for chosen in (keys, kept, kept)
    )
    assert [documents.figures[0].reused for documents in (alone, miss, hit)] == [False, False, True]
    same(alone, miss)
    same(alone, hit)


@examples(2)
@given(runs())
@pytest.mark.usefixtures("small_batches")
def test_several_processes_give_the_documents_of_one(
    run_on: Any, tmp_path_factory: pytest.TempPathFactory, drawn: Any
) -> None:
    kind, records, keys = drawn
    path = write(tmp_path_factory.mktemp("apart") / "data.jsonl", records)
    tokens, keys = tokenizer("byte-level", TOKENS), {"chat_template_jinja": TEMPLATE, **keys}
    same(*(load_documents(run_on(path, kind, dataset_num_proc=n, **keys), tokens) for n in (1, 2)))


def found_in(path: Path) -> list[dict[str, Any]]:
    config = Config(datasets=[{"path": str(path), "type": "completion"}])
    return [record for _, record in read_source(find_sources(config)[0][0])]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | any_text
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@examples(60)
@given(
    st.lists(st.fixed_dictionaries({"text": any_text, "x": VALUES}), min_size=2, max_size=9),
    VALUES, st.booleans(), st.sampled_from([1, 3, 16, 999]),
)  # fmt: skip
def test_records_are_the_same_in_every_layout_of_json(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], other: Any, ascii: bool, size: int
) -> None:
    """Any JSON values, in windows so small that each value crosses their edges."""

    def dump(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ascii, indent=indent)

    aside = json.dumps(other) if isinstance(other, list) else other
    layouts = (
        "\n".join(map(dump, records)),
        dump(records),
        dump(records, indent=2),
        dump({"n": aside, "data": records, "end": aside}),
        "\ufeff" + dump({"data": records}, indent=1) + "\n\n",
        "\n".join(dump(record, indent=1) for record in records),
    )
    path = tmp_path_factory.mktemp("layouts") / "a.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnimg.train.data.json_records.CHUNK_BYTES", size)
        for text in layouts:
            path.write_bytes(text.encode())
            assert found_in(path) == records, text


@examples(40)
@given(st.lists(st.fixed_dictionaries({"text": any_text, "b": any_text}), min_size=1, max_size=5))
def test_records_are_the_same_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]
) -> None:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("formats")
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    for name, pack in (("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress),
                       (".xz", lzma.compress), (".bz2", bz2.compress)):  # fmt: skip
        (folder / f"a.jsonl{name}").write_bytes(pack(lines))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        written = io.StringIO(newline="")
        rows = csv.DictWriter(written, ["text", "b"], delimiter=delimiter, quoting=csv.QUOTE_ALL)
        rows.writeheader()
        rows.writerows(records)
        (folder / name).write_bytes(written.getvalue().encode())
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    for name, make in (("a.arrow", pyarrow.ipc.new_stream), ("b.arrow", pyarrow.ipc.new_file)):
        with make(folder / name, table.schema) as file:
            file.write_table(table)
    for path in sorted(folder.iterdir()):
        assert found_in(path) == records, path.name


@examples(60)
@given(st.integers(1, 30), st.none() | st.integers(-40, 40), st.none() | st.integers(-40, 40))
def test_a_slice_takes_the_rows_of_a_list(
    tmp_path_factory: pytest.TempPathFactory, count: int, start: int | None, stop: int | None
) -> None:
    rows = [{"text": str(number)} for number in range(count)]
    path = write(tmp_path_factory.mktemp("slices") / "a.jsonl", rows)
    split = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    config = Config(datasets=[{"path": path, "type": "completion", "split": split}])
    wanted = rows[start:stop]
    with nullcontext() if wanted else pytest.raises(AttnimgError):
        source = find_sources(config)[0][0]
        assert [record for _, record in read_source(source)] == wanted

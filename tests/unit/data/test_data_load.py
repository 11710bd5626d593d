"""All documents of a run: their lengths, the validation part, order, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents, summary_line

Run = Callable[..., Config]
Write = Callable[..., str]

LONG = "In the beginning was the Word. " * 20
TEXTS = [{"text": f"Number {number}."} for number in range(100)]
LONG_ALPACA = {"instruction": LONG, "input": "", "output": "x"}


def rows(documents: Any) -> list[tuple[int, ...]]:
    return [tuple(ids) for ids in documents["input_ids"]]


@pytest.mark.parametrize(
    ("record", "keys", "figures", "says"),
    [
        pytest.param({"text": LONG}, {}, {"split": 1, "records": 2}, "longer than 32 tokens split",
                     id="running text is split"),
        pytest.param({"text": LONG}, {"excess_length_strategy": "drop"},
                     {"too_long": 1, "documents": 1}, "1 longer than 32 tokens dropped",
                     id="or dropped"),
        pytest.param({"text": LONG}, {"excess_length_strategy": "truncate"},
                     {"truncated": 1, "documents": 2}, "1 longer than 32 tokens truncated",
                     id="or truncated"),
        pytest.param({"text": " \n"}, {}, {"empty": 1, "documents": 1}, "1 empty ones dropped",
                     id="a record without text is dropped"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_counted_and_said(
    run_on: Run, json_lines: Write, tokenizer: Any,
    record: Any, keys: dict[str, Any], figures: dict[str, int], says: str,
) -> None:  # fmt: skip
    path = json_lines(record, {"text": "x y z"})
    documents = load_documents(run_on(path, sequence_len=32, **keys), tokenizer)
    found = documents.figures[0]
    assert {name: getattr(found, name) for name in figures} == figures
    assert says in summary_line(found)
    lengths = [len(ids) for ids in documents.train["input_ids"]]
    assert all(1 <= length <= 32 for length in lengths)
    assert (len(lengths), sum(lengths)) == (found.documents, found.tokens)


@pytest.mark.parametrize(
    ("strategy", "figures"),
    [
        pytest.param(None, {"too_long": 1}, id="a long instruction is dropped"),
        pytest.param("truncate", {"truncated": 1, "without_loss": 1},
                     id="a prompt alone has no loss"),
        pytest.param("split", {"split": 1, "without_loss": 1}, id="nor have pieces of a prompt"),
    ],
)  # fmt: skip
def test_instructions_without_loss_are_dropped(
    run_on: Run, json_lines: Write, tokenizer: Any, strategy: str | None, figures: dict[str, int]
) -> None:
    path = json_lines(LONG_ALPACA, {"instruction": "a", "output": "b"})
    config = run_on(path, "alpaca", sequence_len=160, excess_length_strategy=strategy)
    found = load_documents(config, tokenizer).figures[0]
    assert {name: getattr(found, name) for name in figures} == figures


def test_splitting_loses_no_token(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    path = json_lines({"text": LONG})
    keys = {"shuffle_merged_datasets": False}
    whole = load_documents(run_on(path, sequence_len=4096, **keys), tokenizer).train
    parts = load_documents(run_on(path, sequence_len=33, **keys), tokenizer).train
    assert len(parts) > 1
    assert [token for row in rows(parts) for token in row] == list(rows(whole)[0])


def test_raise_names_the_record(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    config = run_on(
        json_lines(TEXTS[0], {"text": LONG}), sequence_len=32, excess_length_strategy="raise"
    )
    with pytest.raises(AttnimgError, match=r"too long: .*line 2"):
        load_documents(config, tokenizer)


def test_nothing_left_is_an_error(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    path = json_lines({"text": "", "body": "x y"}, {"text": " ", "body": "z"})
    with pytest.raises(AttnimgError, match="2 without text") as caught:
        load_documents(run_on(path), tokenizer)
    assert caught.value.code == "empty-dataset"
    assert "name the column" in caught.value.do
    assert len(load_documents(run_on(path, spec_field="body"), tokenizer).train) == 2


@pytest.mark.parametrize("strategy", ["drop", "truncate", "raise"])
def test_records_that_are_all_too_long_are_refused_by_the_length_they_need(
    run_on: Run, json_lines: Write, tokenizer: Any, strategy: str
) -> None:
    path = json_lines(LONG_ALPACA)
    keys = {"excess_length_strategy": strategy, "train_on_inputs": False}
    short = run_on(path, "alpaca", sequence_len=32, **keys)
    with pytest.raises(AttnimgError) as caught:
        load_documents(short, tokenizer)
    needed = int(caught.value.do.partition("set sequence_len: ")[2].partition(",")[0])
    enough = run_on(path, "alpaca", sequence_len=needed, **keys)
    assert len(load_documents(enough, tokenizer).train) == 1


def test_records_without_loss_are_refused_by_a_key_that_gives_them_some(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = json_lines({"messages": talk})
    keys: dict[str, Any] = {"spec_roles_to_train": ["system"]}
    with pytest.raises(AttnimgError) as caught:
        load_documents(run_on(path, "chat_template", **keys), tokenizer)
    assert "train_on_inputs: true," in caught.value.do
    given = run_on(path, "chat_template", train_on_inputs=True, **keys)
    assert len(load_documents(given, tokenizer).train) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(0.1, 10, id="a share"),
        pytest.param(7, 7, id="a count"),
        pytest.param(0.001, 1, id="at least one"),
        pytest.param(2, 2, id="two is a count"),
    ],
)
def test_validation_is_taken_out_of_training(
    run_on: Run, json_lines: Write, tokenizer: Any, size: float, expected: int
) -> None:
    documents = load_documents(run_on(json_lines(*TEXTS), val_set_size=size), tokenizer)
    train, validation = set(rows(documents.train)), set(rows(documents.validation))
    assert (len(train), len(validation)) == (100 - expected, expected)
    assert not train & validation


@pytest.mark.parametrize("size", [100, 101, 2.5, 0.999, 1, 1.0])
def test_a_validation_part_that_does_not_fit_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any, size: float
) -> None:
    with pytest.raises(AttnimgError) as caught:
        load_documents(run_on(json_lines(*TEXTS), val_set_size=size), tokenizer)
    assert (caught.value.code, caught.value.key) == ("bad-value", "val_set_size")
    assert "val_set_size: 0.05," in caught.value.do
    assert load_documents(run_on(json_lines(*TEXTS), val_set_size=0.05), tokenizer).validation


def test_one_document_is_too_few_for_a_validation_part(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    with pytest.raises(AttnimgError) as caught:
        load_documents(run_on(json_lines(TEXTS[0]), val_set_size=0.05), tokenizer)
    assert "val_set_size: 0," in caught.value.do
    assert len(load_documents(run_on(json_lines(TEXTS[0]), val_set_size=0), tokenizer).train) == 1


def test_test_datasets_are_the_validation(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    test = [{"path": json_lines(TEXTS[0], name="test.jsonl"), "type": "completion"}]
    config = run_on(json_lines(*TEXTS[1:]), test_datasets=test)
    documents = load_documents(config, tokenizer)
    assert (len(documents.train), len(documents.validation or [])) == (99, 1)
    assert [figures.key for figures in documents.figures] == ["datasets[0]", "test_datasets[0]"]


@pytest.mark.parametrize(
    ("train", "test", "warns"),
    [
        pytest.param({}, {}, False, id="train and test by default"),
        pytest.param({"split": "train"}, {"split": "train"}, True, id="the same split"),
        pytest.param({"split": "train"}, {"split": "train[:10%]"}, True, id="a part of it"),
        pytest.param({"split": "train[10%:]"}, {"split": "train[:10%]"}, False, id="two parts"),
        pytest.param({"split": "train+test"}, {}, True, id="both splits"),
        pytest.param({"data_files": "test.jsonl"}, {"split": "test"}, True, id="the same file"),
    ],
)  # fmt: skip
def test_evaluating_on_what_is_trained_on_is_told(
    json_lines: Write, tokenizer: Any, tmp_path: Path, train: Any, test: Any, warns: bool
) -> None:
    (tmp_path / "d").mkdir()
    json_lines(*TEXTS[:50], name="d/train.jsonl")
    json_lines(*TEXTS[50:], name="d/test.jsonl")
    entry = {"path": str(tmp_path / "d"), "type": "completion"}
    config = Config(datasets=[entry | train], test_datasets=[entry | test])
    assert any("both read" in text for text in load_documents(config, tokenizer).warnings) == warns


@pytest.mark.parametrize(
    ("datasets", "test", "share", "told"),
    [
        pytest.param([{}], None, 0.2, None, id="a part of one file"),
        pytest.param([{"split": "train[:50]"}, {"split": "train[50:]"}], None, 20, None,
                     id="a part of two halves"),
        pytest.param([{}, {}], None, 0.2, " of 40 ", id="a part of a file that is named twice"),
        pytest.param([{"split": "train[:60]"}], {"split": "train[60:]"}, 0, None, id="two slices"),
        pytest.param([{"split": "train[:60]"}], {"split": "train[50:]"}, 0, "10 of 50 ",
                     id="slices that overlap"),
        pytest.param([{}], {"path": "copy.jsonl"}, 0, "3 of 4 ", id="copied records"),
    ],
)  # fmt: skip
def test_documents_on_both_sides_are_told(
    json_lines: Write, tokenizer: Any, tmp_path: Path, datasets: Any, test: Any, share: Any,
    told: str | None,
) -> None:  # fmt: skip
    path = json_lines(*TEXTS)
    json_lines(*TEXTS[:3], {"text": "Only here."}, name="copy.jsonl")
    entries = [{"path": path, "type": "completion", **entry} for entry in [*datasets, test or {}]]
    if test and "path" in test:
        entries[-1]["path"] = str(tmp_path / test["path"])
    config = Config(
        datasets=entries[:-1], test_datasets=entries[-1:] if test else None, val_set_size=share
    )
    found = [
        text
        for text in load_documents(config, tokenizer).warnings
        if "also in the training data" in text
    ]
    assert [told in text for text in found] == ([True] if told else [])


def test_the_order_is_the_seeds_alone(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    path = json_lines(*TEXTS)
    keys: dict[str, Any] = {"val_set_size": 0.1}
    first = load_documents(run_on(path, **keys), tokenizer)
    again = load_documents(run_on(path, **keys), tokenizer)
    other = load_documents(run_on(path, seed=1, **keys), tokenizer)
    assert rows(first.train) == rows(again.train)
    assert rows(first.validation) == rows(again.validation)
    assert rows(first.train) != rows(other.train)
    plain = load_documents(run_on(path, shuffle_merged_datasets=False), tokenizer)
    assert [tokenizer.decode(row[:-1]) for row in rows(plain.train)] == [
        record["text"] for record in TEXTS
    ]


def test_a_worker_process_hands_its_error_on(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    path = json_lines({"messages": [{"role": "user", "content": "a"}]})
    keys = {"chat_template_jinja": "{{ messages[1].content }}", "dataset_num_proc": 2}
    with pytest.raises(AttnimgError) as caught:
        load_documents(run_on(path, "chat_template", **keys), tokenizer)
    assert caught.value.do


def test_sources_are_merged(run_on: Run, json_lines: Write, tokenizer: Any) -> None:
    texts = json_lines(*TEXTS[:3], name="a.jsonl")
    alpaca = json_lines({"instruction": "a", "output": "b"}, name="b.jsonl")
    config = Config(
        datasets=[{"path": texts, "type": "completion"}, {"path": alpaca, "type": "alpaca"}]
    )
    documents = load_documents(config, tokenizer)
    assert [figures.documents for figures in documents.figures] == [3, 1]
    assert len(documents.train) == 4
    assert [str(f.feature.dtype) for f in documents.train.features.values()] == ["int32", "int32"]

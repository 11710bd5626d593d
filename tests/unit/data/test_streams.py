"""Test what is read of a stream, in which order, and which keys it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attnimg.config import check_values
from attnimg.config.schema import Config, DatasetSpec, is_streamed
from attnimg.config.without_effect import keys_without_effect
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents
from attnimg.train.data.sources import Source, read_source
from attnimg.train.data.streams import shuffle_in_buffer
from attnimg.train.rows import pack

Write = Callable[..., str]

RUN: dict[str, Any] = {
    "streaming": True, "max_steps": 3, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    "sequence_len": 16, "sample_packing": True, "streaming_multipack_buffer_size": 8,
}  # fmt: skip


@pytest.fixture
def endless(tmp_path: Path) -> str:
    """Write a file of 2,000 records; the last one is broken, so that reading all of it fails."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "zq {n}"}}\n' for n in range(2000)) + "{broken\n")
    return str(path)


def config(path: str, **keys: Any) -> Config:
    kind = keys.pop("under", "datasets")
    return Config(**{kind: [{"path": path, "type": "completion", **keys.pop("spec", {})}],
                     **RUN, **keys})  # fmt: skip


def numbers(found: Any, tokenizer: Any) -> list[int]:
    return [int(tokenizer.decode(ids[:-1]).split()[1]) for ids in found.train["input_ids"]]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("processes", [None, 2])
def test_a_stream_is_read_as_far_as_the_steps_need(
    tokenizer: Any, endless: str, tmp_path: Path, kept: bool, processes: int | None
) -> None:
    run = config(endless, dataset_num_proc=processes,
                 dataset_prepared_path=str(tmp_path / "kept") if kept else None)  # fmt: skip
    found = load_documents(run, tokenizer)
    lengths = [len(ids) for ids in found.train["input_ids"]]
    assert 12 * 16 <= sum(lengths) < 12 * 16 + 256 * max(lengths)
    assert pack(lengths, capacity=16, seed=42).count >= 12
    assert found.figures[0].records == 256  # one batch
    assert load_documents(run, tokenizer).train["input_ids"] == found.train["input_ids"]
    with pytest.raises(AttnimgError, match=r"line 2001"):
        load_documents(run.model_copy(update={"streaming": False}), tokenizer)


def test_documents_that_are_not_packed_are_counted(tokenizer: Any, endless: str) -> None:
    run = config(endless, sample_packing=False, max_steps=100)
    assert 400 <= len(load_documents(run, tokenizer).train) <= 512


def test_the_buffer_shuffles_the_stream(tokenizer: Any, endless: str) -> None:
    plain = numbers(load_documents(config(endless, shuffle_merged_datasets=False), tokenizer),
                    tokenizer)  # fmt: skip
    assert plain == list(range(256))
    buffered = [
        numbers(load_documents(config(endless, **keys), tokenizer), tokenizer)
        for keys in ({}, {}, {"seed": 7}, {"streaming_multipack_buffer_size": 500})
    ]
    assert buffered[0] == buffered[1] != buffered[2]
    assert max(buffered[0]) < 256 + 8 <= max(buffered[3])
    assert all(len({*found}) == 256 for found in buffered)


@pytest.mark.parametrize("size", [1, 7, 100, 500])
def test_the_buffer_loses_no_record(size: int) -> None:
    records: Any = list(range(100))
    assert sorted(shuffle_in_buffer(records, size=size, seed=1)) == records


def test_a_stream_that_ends_early_is_a_warning(tokenizer: Any, json_lines: Write) -> None:
    found = load_documents(config(json_lines({"text": "zq 1"}, {"text": "zq 2"})), tokenizer)
    assert any("has 2 documents, fewer than max_steps needs" in text for text in found.warnings)
    assert len(found.train) == 2


@pytest.mark.parametrize("streamed", [False, True])
def test_skipped_records_are_left_out(tokenizer: Any, json_lines: Write, streamed: bool) -> None:
    path = json_lines(*({"text": f"zq {n}"} for n in range(9)))
    run = config(path, under="pretraining_dataset", spec={"skip": 4}, streaming=streamed)
    assert sorted(numbers(load_documents(run, tokenizer), tokenizer)) == [4, 5, 6, 7, 8]


def test_a_hub_dataset_is_read_as_it_arrives(json_lines: Write, tmp_path: Path) -> None:
    # The library reads local files as it reads those of the hub; the broken one is never reached.
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    files = [json_lines({"text": "zq 0"}), str(tmp_path / "broken.jsonl")]
    spec = DatasetSpec(path="json", data_files=files, type="completion")
    source = Source(key="datasets[0]", spec=spec, kind="hub")
    place, record = next(read_source(source, stream=True))
    assert (str(place), record) == ("json, record 1", {"text": "zq 0"})
    with pytest.raises(AttnimgError, match="cannot read the dataset json"):
        list(read_source(source, stream=True))
    rows = Source(key="datasets[0]", spec=spec.model_copy(update={"split": "train[:3]"}),
                  kind="hub")  # fmt: skip
    with pytest.raises(AttnimgError, match="cannot be streamed") as caught:
        next(read_source(rows, stream=True))
    assert caught.value.do == "set datasets[0].split: train"


def errors(**keys: Any) -> list[tuple[str | None, str]]:
    values = {"base_model": "m", "learning_rate": 1e-3, "attn_implementation": "sdpa",
              "datasets": [{"path": "d", "type": "completion"}], **RUN, **keys}  # fmt: skip
    values = {key: value for key, value in values.items() if value is not None}
    return [(error.key, error.code) for error in check_values(values, file="c.yaml").errors]


TWO = [{"path": "d", "type": "completion"}] * 2


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({}, None),
        ({"max_steps": None}, "max_steps"),
        ({"val_set_size": 0.1}, "val_set_size"),
        ({"dataset_exact_deduplication": True}, "dataset_exact_deduplication"),
        ({"datasets": TWO}, "streaming"),
        ({"datasets": [{**TWO[0], "shards": 2}]}, "datasets[0].shards"),
        ({"datasets": TWO, "streaming": False, "max_steps": None}, None),
        ({"test_datasets": TWO}, None),
        ({"streaming": None, "max_steps": None}, None),
        ({"streaming": None, "max_steps": None, "datasets": None, "pretraining_dataset": TWO[:1]},
         "max_steps"),
        ({"pretrain_multipack_attn": True}, None),
        ({"streaming_multipack_buffer_size": 0}, "streaming_multipack_buffer_size"),
    ],
)  # fmt: skip
def test_a_stream_needs_an_end_and_a_single_dataset(keys: Any, key: str | None) -> None:
    assert errors(**keys) == ([(key, "bad-value")] if key else [])


def test_packed_documents_never_see_each_other() -> None:
    assert errors(pretrain_multipack_attn=False) == [
        ("pretrain_multipack_attn", "unsupported-key")
    ]  # fmt: skip
    assert errors(pretrain_multipack_attn=False, sample_packing=False) == []


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"streaming": False}, "streaming_multipack_buffer_size"),
        ({"shuffle_merged_datasets": False}, "streaming_multipack_buffer_size"),
        ({"dataset_num_proc": 2}, "dataset_num_proc"),
        ({"pretrain_multipack_attn": True}, "pretrain_multipack_attn"),
        ({"spec": {"skip": 2}}, "datasets[0].skip"),
        ({"spec": {"skip": 2}, "under": "pretraining_dataset", "pretrain_multipack_attn": True},
         None),
    ],
)  # fmt: skip
def test_keys_of_streams_without_effect_are_named(keys: Any, named: str | None) -> None:
    found = keys_without_effect(config("d", **keys))
    assert [text.partition(" has no effect")[0].split()[-1] for text in found] == (
        [named] if named else []
    )


ONE: dict[str, Any] = {"pretraining_dataset": [{"path": "a"}], "max_steps": 2}


@pytest.mark.parametrize(
    ("keys", "streamed"),
    [
        (ONE, True),
        ({**ONE, "streaming": False}, False),
        ({**ONE, "max_steps": None}, False),
        ({**ONE, "val_set_size": 0.1}, False),
        ({**ONE, "dataset_exact_deduplication": True}, False),
        ({**ONE, "pretraining_dataset": [{"path": "a", "shards": 2}]}, False),
        ({**ONE, "pretraining_dataset": [{"path": "a"}, {"path": "b"}]}, False),
        ({"datasets": [{"path": "a"}], "max_steps": 2}, False),
        ({"datasets": [{"path": "a"}], "max_steps": 2, "streaming": True}, True),
    ],
    ids=str,
)
def test_a_pretraining_dataset_is_streamed_where_it_can_be(
    keys: dict[str, Any], streamed: bool
) -> None:
    values = {"base_model": "m", "learning_rate": 1e-4, **keys}
    assert check_values(values, file="x").ok
    assert is_streamed(Config.model_validate(values)) is streamed


def test_only_the_needed_records_of_a_pretraining_dataset_are_read(
    tokenizer: Any, endless: str
) -> None:
    run = config(endless, under="pretraining_dataset", streaming=None,
                 streaming_multipack_buffer_size=None, shuffle_merged_datasets=False)  # fmt: skip
    assert load_documents(run, tokenizer).figures[0].records < 2000
    with pytest.raises(AttnimgError, match=r"line 2001"):
        load_documents(run.model_copy(update={"streaming": False}), tokenizer)

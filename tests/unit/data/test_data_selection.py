"""Test which records and documents are used: shards, short ones, copies, order of datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.train.data import load_documents, summary_line

Write = Callable[..., str]


def texts(found: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(ids[:-1]) for ids in found["input_ids"]]


def numbered(write: Write, count: int, name: str = "data.jsonl") -> str:
    return write(*({"text": f"{name[0]}{number}"} for number in range(count)), name=name)


@pytest.mark.parametrize("count", [7, 8])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_shard_has_the_records_of_axolotl(
    tokenizer: Any, json_lines: Write, tmp_path: Any, count: int, prepared: bool
) -> None:
    path, found = numbered(json_lines, count), list[str]()
    rows = datasets.Dataset.from_dict({"text": [f"d{number}" for number in range(count)]})
    for index in range(3):
        spec = {"path": path, "type": "completion", "shards": 3, "shards_idx": index}
        config = Config(
            datasets=[spec], dataset_prepared_path=str(tmp_path / "kept") if prepared else None
        )
        # What axolotl 0.19.0 does in utils/data/sft.py, _load_and_process_single_dataset.
        theirs = rows.shuffle(seed=42).shard(num_shards=3, index=index)["text"]
        part = texts(load_documents(config, tokenizer).train, tokenizer)
        assert sorted(part) == sorted(theirs)
        found += part
    assert sorted(found) == sorted(rows["text"])


def test_a_shard_without_records_is_refused(tokenizer: Any, json_lines: Write) -> None:
    spec = {"path": numbered(json_lines, 2), "type": "completion", "shards": 3, "shards_idx": 2}
    with pytest.raises(AttnimgError, match="of 0 records") as caught:
        load_documents(Config(datasets=[spec]), tokenizer)
    assert caught.value.do == "set datasets[0].shards_idx: 0"


def test_another_seed_takes_another_shard(tokenizer: Any, json_lines: Write, tmp_path: Any) -> None:
    spec = {"path": numbered(json_lines, 40), "type": "completion", "shards": 2}
    parts = [
        set(texts(load_documents(Config(datasets=[spec], seed=seed, dataset_prepared_path=str(
            tmp_path)), tokenizer).train, tokenizer))
        for seed in (1, 2, 1)
    ]  # fmt: skip
    assert parts[0] == parts[2] != parts[1]
    assert {len(part) for part in parts} == {20}


@pytest.mark.parametrize(
    ("strategy", "lengths", "short"),
    [("split", [4, 4], 2), ("drop", [], 1), ("truncate", [4], 1)],
)
def test_short_documents_are_dropped_and_counted(
    tokenizer: Any, json_lines: Write, strategy: str, lengths: list[int], short: int
) -> None:
    # 9 tokens with the end token: two pieces of 4, and one of 1.
    path = json_lines({"text": "zqzqzqzq"}, {"text": "zq"}, {"text": "zqz"})
    config = Config(
        datasets=[{"path": path, "type": "completion"}], sequence_len=4, min_sample_len=4,
        excess_length_strategy=strategy, shuffle_merged_datasets=False,
    )  # fmt: skip
    found = load_documents(config, tokenizer)
    assert [len(ids) for ids in found.train["input_ids"]] == [*lengths, 4]
    assert found.figures[0].too_short == short
    assert f"{short} shorter than min_sample_len dropped" in summary_line(found.figures[0])
    longer = config.model_copy(update={"min_sample_len": 5})
    with pytest.raises(AttnimgError, match="min_sample_len") as caught:
        load_documents(longer, tokenizer)
    assert (caught.value.code, caught.value.do) == ("empty-dataset", "remove min_sample_len")


def test_copies_are_removed_once_their_labels_agree_too(tokenizer: Any, json_lines: Write) -> None:
    pair = {"instruction": "a", "output": "b"}
    first = json_lines(pair, pair, {"instruction": "a", "output": "c"}, name="a.jsonl")
    test = json_lines(pair, pair, name="t.jsonl")
    sources = [{"path": first, "type": "alpaca"}, {"path": first, "type": "alpaca_instruct"}]
    keys: dict[str, Any] = {
        "datasets": sources,
        "test_datasets": [{"path": test, "type": "alpaca"}],
    }
    found = load_documents(Config(**keys, dataset_exact_deduplication=True), tokenizer)
    assert (len(found.train), found.validation and len(found.validation)) == (2, 1)
    assert len({tuple(ids) for ids in found.train["input_ids"]}) == 2
    assert [text for text in found.warnings if text.startswith("dataset_exact")] == [
        "dataset_exact_deduplication: 4 of 6 training documents were copies of others, and were "
        "removed",
        "dataset_exact_deduplication: 1 of 2 evaluation documents were copies of others, and were "
        "removed",
    ]
    assert len(load_documents(Config(**keys), tokenizer).train) == 6


def test_the_same_tokens_with_other_labels_are_no_copy(tokenizer: Any, json_lines: Write) -> None:
    path = json_lines(
        {"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [5, 6], "labels": [5, 6]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    )  # fmt: skip
    config = Config(datasets=[{"path": path}], dataset_exact_deduplication=True)
    assert len(load_documents(config, tokenizer).train) == 2


def test_each_dataset_is_shuffled_on_its_own(tokenizer: Any, json_lines: Write) -> None:
    paths = [numbered(json_lines, 9, f"{name}.jsonl") for name in "ab"]
    keys: dict[str, Any] = {
        "datasets": [{"path": path, "type": "completion"} for path in paths],
        "shuffle_merged_datasets": False,
    }
    plain = texts(load_documents(Config(**keys), tokenizer).train, tokenizer)
    shuffled = texts(
        load_documents(Config(**keys, shuffle_before_merging_datasets=True), tokenizer).train,
        tokenizer,
    )
    # What axolotl 0.19.0 does in utils/data/shared.py, merge_datasets.
    parts = [datasets.Dataset.from_dict({"text": plain[a : a + 9]}) for a in (0, 9)]
    assert shuffled == [text for part in parts for text in part.shuffle(seed=42)["text"]]
    assert shuffled != plain

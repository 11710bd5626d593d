"""All documents of a run: their lengths, the validation part, order, and what is kept on disk."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.schema import Config
from attnimg.train.data import load_documents, sentence

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
    assert says in sentence(found)
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
    with pytest.raises(AttnimgError, match="2 hold no text") as caught:
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


def test_two_processes_give_the_same_documents(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    rng = random.Random(0)
    talks = [
        [
            {"role": role, "content": "".join(rng.choices("ab é\u200b\n漢", k=8)) + "x"}
            for _ in range(rng.randint(1, 3))
            for role in ("user", "assistant")
        ]
        for _ in range(600)
    ]
    path = json_lines(*[{"messages": talk} for talk in talks])
    one = load_documents(run_on(path, "chat_template"), tokenizer)
    two = load_documents(run_on(path, "chat_template", dataset_num_proc=2), tokenizer)
    assert rows(one.train) == rows(two.train)
    assert one.figures == two.figures


def test_a_worker_process_hands_its_error_on(
    run_on: Run, json_lines: Write, tokenizer: Any
) -> None:
    path = json_lines({"messages": [{"role": "user", "content": "a"}]})
    keys = {"chat_template_jinja": "{{ messages[1].content }}", "dataset_num_proc": 2}
    with pytest.raises(AttnimgError) as caught:
        load_documents(run_on(path, "chat_template", **keys), tokenizer)
    assert caught.value.do


def test_prepared_documents_are_reused_until_something_changes(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines(*TEXTS)
    keys: dict[str, Any] = {"dataset_prepared_path": str(tmp_path / "prepared")}
    first = load_documents(run_on(path, **keys), tokenizer)
    again = load_documents(run_on(path, **keys, val_set_size=0.5), tokenizer)
    assert (first.figures[0].reused, again.figures[0].reused) == (False, True)
    assert "reused" in sentence(again.figures[0])
    assert sorted(rows(first.train)) == sorted(rows(again.train) + rows(again.validation))
    assert rows(first.train) == rows(load_documents(run_on(path), tokenizer).train)
    assert not load_documents(run_on(path, **keys, sequence_len=64), tokenizer).figures[0].reused
    json_lines(*TEXTS[:50])
    assert not load_documents(run_on(path, **keys), tokenizer).figures[0].reused
    assert not list((tmp_path / "prepared").glob(".partial-*"))


def test_a_broken_record_leaves_nothing_prepared(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = json_lines(TEXTS[0], {"text": 3})
    config = run_on(path, dataset_prepared_path=str(tmp_path / "prepared"))
    with pytest.raises(AttnimgError, match="line 2"):
        load_documents(config, tokenizer)
    assert [path.name[:5] for path in (tmp_path / "prepared").iterdir()] == [".lock"]


def test_a_prepared_path_that_cannot_be_written_is_refused(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    path = json_lines(*TEXTS)
    for prepared in (tmp_path / "file", tmp_path / "file" / "prepared", tmp_path / ("x" * 300)):
        with pytest.raises(AttnimgError) as caught:
            load_documents(run_on(path, dataset_prepared_path=str(prepared)), tokenizer)
        assert caught.value.key == "dataset_prepared_path"
    assert "take it out" in caught.value.do
    assert len(load_documents(run_on(path), tokenizer).train) == 100


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None], *, sign: bool) -> None:
    """Change the figures of a kept folder, with or without the hash that vouches for them."""
    file = folder / "figures.json"
    kept = json.loads(file.read_text())
    change(kept["facts"])
    if sign:
        kept["sha256"] = sha256(json.dumps(kept["facts"], sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(kept))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the documents": (lambda f: flip(f / "documents.arrow"), "damaged"),
    "documents cut off": (lambda f: os.truncate(f / "documents.arrow", 200), "damaged"),
    "no documents": (lambda f: (f / "documents.arrow").unlink(), "documents.arrow cannot be read"),
    "no figures": (lambda f: (f / "figures.json").unlink(), "figures.json cannot be read"),
    "empty figures": (lambda f: (f / "figures.json").write_text(""), "damaged"),
    "figures of another kind": (lambda f: (f / "figures.json").write_text("[1]"), "damaged"),
    "figures too deep": (lambda f: (f / "figures.json").write_text("[" * 50_000), "damaged"),
    "figures that are no text": (lambda f: (f / "figures.json").write_bytes(b"\xff\0"), "damaged"),
    "other figures": (
        lambda f: rewritten(f, lambda facts: facts["figures"].update(tokens=1), sign=False),
        "damaged",
    ),
    "another key": (
        lambda f: rewritten(f, lambda facts: facts.update(key="0" * 64), sign=True), "other data",
    ),
    "writable by others": (lambda f: (f / "documents.arrow").chmod(0o666), "others may write"),
    "a folder writable by others": (lambda f: f.chmod(0o777), "others may write"),
    "documents that are a pipe": (lambda f: replaced(f / "documents.arrow", os.mkfifo), "no plain"),
    "figures that are a pipe": (lambda f: replaced(f / "figures.json", os.mkfifo), "no plain"),
    "a link": (
        lambda f: replaced(f / "documents.arrow", lambda p: p.symlink_to("/dev/zero")), "no plain",
    ),
    "a file for the folder": (lambda f: replaced(f, Path.touch), "no plain"),
    "a pipe for the folder": (lambda f: replaced(f, os.mkfifo), "no plain"),
    "a link for the folder": (lambda f: replaced(f, lambda p: p.symlink_to("/")), "no plain"),
    "an empty folder": (lambda f: replaced(f, Path.mkdir), "figures.json cannot be read"),
    "a folder in the file's place": (
        lambda f: replaced(f / "documents.arrow", Path.mkdir), "no plain",
    ),
}  # fmt: skip
if os.geteuid() == 0:
    DAMAGES |= {
        "another user's folder": (lambda f: os.chown(f, 12345, -1), "belongs to user 12345"),
        "another user's file": (
            lambda f: os.chown(f / "figures.json", 12345, -1), "belongs to user 12345",
        ),
    }  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_kept_folder_that_is_not_whole_and_own_is_prepared_again(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, damage: str
) -> None:
    config = run_on(json_lines(*TEXTS[:5]), dataset_prepared_path=str(tmp_path / "prepared"))
    first = load_documents(config, tokenizer)
    expected = rows(first.train)
    assert first.warnings == ()
    (folder,) = (tmp_path / "prepared").glob("[!.]*")
    assert load_documents(config, tokenizer).figures[0].reused
    change, reason = DAMAGES[damage]
    change(folder)
    again = load_documents(config, tokenizer)
    assert not again.figures[0].reused
    assert len(again.warnings) == 1
    assert reason in again.warnings[0]
    assert "prepared again" in again.warnings[0]
    assert (rows(again.train), again.figures) == (expected, first.figures)
    kept = load_documents(config, tokenizer)
    assert (kept.figures[0].reused, kept.warnings) == (True, ())
    assert [path.name for path in (tmp_path / "prepared").glob("[!.]*")] == [folder.name]


def test_other_data_of_the_same_size_and_time_are_prepared_again(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    path = Path(json_lines(*TEXTS))
    config = run_on(path, dataset_prepared_path=str(tmp_path / "prepared"))
    first, before = load_documents(config, tokenizer), path.stat()
    path.write_bytes(path.read_bytes().replace(b"Number 7.", b"Number 9."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    again = load_documents(config, tokenizer)
    assert not again.figures[0].reused
    assert again.figures[0].content != first.figures[0].content
    assert rows(again.train) == rows(load_documents(run_on(path), tokenizer).train)


def test_what_is_kept_is_its_users_alone(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    prepared.chmod(0o1777)  # as the image's /cache
    load_documents(run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared)), tokenizer)
    (folder,) = prepared.glob("[!.]*")
    assert sorted(path.name for path in folder.iterdir()) == ["documents.arrow", "figures.json"]
    assert {path.stat().st_mode & 0o077 for path in prepared.rglob("*")} == {0}


def test_a_folder_that_can_only_be_read_is_read(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the refusal of a read-only mount is put in by hand."""
    prepared = tmp_path / "prepared"
    config = run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared))
    load_documents(config, tokenizer)
    (folder,) = prepared.glob("[!.]*")
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(prepared)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    def cannot_remove(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("os.open", read_only)
    monkeypatch.setattr("attnimg.train.data.cache._remove", cannot_remove)
    assert load_documents(config, tokenizer).figures[0].reused
    flip(folder / "documents.arrow")
    with pytest.raises(AttnimgError, match="damaged") as caught:
        load_documents(config, tokenizer)
    assert "Read-only" in caught.value.why


def test_of_several_processes_one_prepares(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path
) -> None:
    """Locks hold between threads as between processes; a killed run's leftovers are removed."""
    prepared = tmp_path / "prepared"
    config = run_on(json_lines(*TEXTS), dataset_prepared_path=str(prepared))
    load_documents(config, tokenizer)
    (folder,) = prepared.glob("[!.]*")
    shutil.copytree(folder, prepared / f".partial-{folder.name}-killed")
    flip(folder / "documents.arrow")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: load_documents(config, tokenizer), range(4)))
    assert sorted(documents.figures[0].reused for documents in found) == [False, True, True, True]
    assert len({tuple(rows(documents.train)) for documents in found}) == 1
    assert not list(prepared.glob(".partial-*"))


@pytest.mark.parametrize("seed", range(6))
def test_kept_documents_are_those_prepared_in_memory(
    run_on: Run, json_lines: Write, tokenizer: Any, tmp_path: Path, seed: int
) -> None:
    """Random records, settings and order: a miss, a hit and no folder give the same."""
    rng = random.Random(seed)
    letters = "aé\u00a0\u200b\U0001f600 \n\t漢"

    def sentence_of(most: int) -> str:
        return "".join(rng.choices(letters, k=rng.randint(1, most)))

    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "completion": lambda: {"text": sentence_of(80)},
        "alpaca": lambda: {"instruction": sentence_of(9), "output": sentence_of(9) + "x"},
        "chat_template": lambda: {
            "messages": [
                {"role": role, "content": sentence_of(9) + "x"}
                for _ in range(rng.randint(1, 3)) for role in ("user", "assistant")
            ]
        },
    }  # fmt: skip
    type = rng.choice(list(kinds))
    path = json_lines(*[kinds[type]() for _ in range(rng.randint(20, 400))])
    keys: dict[str, Any] = {
        "sequence_len": rng.choice([175, 256]), "seed": seed,
        "val_set_size": rng.choice([0, 0.2, 3]), "train_on_inputs": rng.random() < 0.5,
        "excess_length_strategy": rng.choice([None, "truncate"]),
        "shuffle_merged_datasets": rng.random() < 0.7,
        "spec_split": rng.choice([None, "train[5:]"]),
    }  # fmt: skip
    kept = keys | {"dataset_prepared_path": str(tmp_path / "prepared")}
    alone, miss, hit = (
        load_documents(run_on(path, type, **chosen), tokenizer) for chosen in (keys, kept, kept)
    )
    assert [documents.figures[0].reused for documents in (alone, miss, hit)] == [False, False, True]
    for other in (miss, hit):
        assert other.train.to_dict() == alone.train.to_dict()
        assert other.figures[0].content == alone.figures[0].content
        assert (other.validation is None) == (alone.validation is None)
        if other.validation and alone.validation:
            assert other.validation.to_dict() == alone.validation.to_dict()


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

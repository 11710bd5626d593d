"""The loss that `attnimg evaluate` prints is that of training's own evaluation."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.runs.evaluate import DocumentLosses

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from tiny_run import make_model, sentences


def write_texts(path: Path, count: int, *, seed: int) -> str:
    lines = [json.dumps({"text": text}) for text in sentences(count, seed=seed)]
    path.write_text("\n".join(lines))
    return str(path)


def write_config(folder: Path, name: str, **keys: Any) -> Path:
    """Write the config of a run on files in the folder."""
    values = {
        "base_model": str(folder / "model"),
        "output_dir": str(folder / name),
        "learning_rate": 1e-2,
        "datasets": [{"path": str(folder / "train.jsonl"), "type": "completion"}],
        "test_datasets": [
            {"path": str(folder / "one.jsonl"), "type": "completion"},
            {"path": str(folder / "two.jsonl"), "type": "completion"},
        ],
        "sequence_len": 64,
        "sample_packing": True,
        "micro_batch_size": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "attn_implementation": "sdpa",
        "bf16": False,
        **keys,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: v for key, v in values.items() if v is not None}))
    return path


def command(*arguments: str) -> int:
    from attnimg.__main__ import run

    return run(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, and two runs trained by the command."""
    folder = tmp_path_factory.mktemp("evaluated")
    make_model(folder / "model")
    for name, count, seed in (("train", 60, 1), ("one", 17, 2), ("two", 9, 3)):
        write_texts(folder / f"{name}.jsonl", count, seed=seed)
    assert command("train", str(write_config(folder, "lora", adapter="lora"))) == 0
    full = write_config(
        folder, "full", test_datasets=None, val_set_size=0.2, eval_sample_packing=False
    )
    assert command("train", str(full)) == 0
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert command("evaluate", "--json", *arguments) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def eval_loss(run: Path) -> float:
    receipt = json.loads((run / "receipt.json").read_text())
    return float(receipt["metrics"]["eval_loss"])


def test_the_loss_is_that_at_the_end_of_training(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    one, two, both = printed(capsys, str(folder / "lora"))
    assert both["loss"] == pytest.approx(eval_loss(folder / "lora"), rel=1e-5)
    assert [part["dataset"] for part in (one, two, both)] == [
        "test_datasets[0]", "test_datasets[1]", "all",
    ]  # fmt: skip
    assert (one["path"], one["documents"], two["documents"]) == (str(folder / "one.jsonl"), 17, 9)
    assert {part["weights"] for part in (one, two, both)} == {str(folder / "lora")}
    for key in ("documents", "tokens", "trained_tokens"):
        assert one[key] + two[key] == both[key]
    total = sum(part["loss"] * part["trained_tokens"] for part in (one, two))
    assert both["loss"] == pytest.approx(total / both["trained_tokens"])
    assert both["perplexity"] == pytest.approx(math.exp(both["loss"]))
    (part,) = printed(capsys, str(folder / "full.yaml"))
    assert part["loss"] == pytest.approx(eval_loss(folder / "full"), rel=1e-5)
    assert (part["dataset"], part["documents"]) == ("val_set_size", 12)
    assert sorted(folder.rglob("*")) == before, "nothing is written"


def test_the_base_model_is_evaluated_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = printed(capsys, str(folder / "lora"))[-1]
    base = printed(capsys, str(folder / "lora.yaml"), "--base")[-1]
    assert base["loss"] > trained["loss"] + 0.1
    assert base["tokens"] == trained["tokens"]
    untrained = write_config(folder, "untrained", adapter="lora")
    assert command("evaluate", str(untrained)) == 0
    said = capsys.readouterr()
    assert "has no trained run" in said.err
    assert f"all: loss {base['loss']:.4f} +- " in said.out
    assert not (folder / "untrained").exists()


def test_data_comes_from_the_config_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (folder / "lora.yaml").read_text()
    other = folder / "other.yaml"
    values = yaml.safe_load(text)
    values["test_datasets"] = [values["test_datasets"][1]]
    other.write_text(yaml.safe_dump(values))
    (part,) = printed(capsys, str(other))
    assert part["path"] == str(folder / "two.jsonl")
    del values["test_datasets"]
    other.write_text(yaml.safe_dump(values))
    assert command("evaluate", str(other)) == 2
    assert "add test_datasets" in capsys.readouterr().err
    assert command("evaluate", str(folder / "model")) == 2
    assert "the folder has no receipt.json" in capsys.readouterr().err


def test_a_broken_record_is_named_before_any_proof(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ATTNIMG_CACHE", str(tmp_path))
    values = yaml.safe_load((folder / "lora.yaml").read_text())
    values["test_datasets"] = [{"path": str(tmp_path / "bad.jsonl"), "type": "completion"}]
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(values))
    assert command("evaluate", str(tmp_path / "bad.yaml"), "--base") == 2
    said = capsys.readouterr().err
    assert "bad.jsonl, line 2" in said
    assert "proof:" not in said
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "too"}\n')
    assert command("evaluate", str(tmp_path / "bad.yaml"), "--base") == 0
    said = capsys.readouterr().err
    assert said.index("2 documents") < said.index("proof: sdpa passed")


@pytest.mark.parametrize("change", ["a new line", "seed", "val_set_size", "other data"])
def test_documents_that_were_trained_are_not_evaluated(
    folder: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "train.jsonl"
    written = path.read_text()
    keys: dict[str, Any] = {"val_set_size": 0.2}
    if change == "a new line":
        path.write_text(json.dumps({"text": "One more."}) + "\n" + written)
    elif change == "seed":
        keys["seed"] = 7
    elif change == "val_set_size":
        keys["val_set_size"] = 0.5
    else:
        keys["datasets"] = [{"path": str(folder / "one.jsonl"), "type": "completion"}]
    other = write_config(
        folder, "split", output_dir=str(folder / "full"), test_datasets=None,
        eval_sample_packing=False, **keys,
    )  # fmt: skip
    try:
        assert command("evaluate", str(other)) == 2
    finally:
        path.write_text(written)
    said = capsys.readouterr().err
    assert "that the run trained on" in said
    assert "in place of val_set_size" in said
    same = write_config(
        folder, "split", output_dir=str(folder / "full"), test_datasets=None,
        eval_sample_packing=False, val_set_size=0.2, micro_batch_size=1,
    )  # fmt: skip
    assert printed(capsys, str(same))[0]["documents"] == 12


def test_changed_test_data_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "two.jsonl"
    written = path.read_text()
    assert command("evaluate", str(folder / "lora")) == 0
    assert "other documents" not in capsys.readouterr().err
    path.write_text(written + "\n" + json.dumps({"text": "One more."}))
    try:
        assert command("evaluate", str(folder / "lora")) == 0
    finally:
        path.write_text(written)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: test_datasets[1]" in said
    assert "has other documents than in training" in said
    assert "test_datasets[0] (" + str(folder / "one.jsonl") + ") has other" not in said


@pytest.mark.parametrize(
    ("run", "rl"), [("full", "dpo"), ("lora", "kto")], ids=["a full run", "an adapter"]
)
def test_data_of_another_method_are_refused(
    folder: Path, run: str, rl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
    if rl == "kto":
        record = {"prompt": "Is it?", "completion": "Yes.", "label": True}
    (folder / "records.jsonl").write_text(json.dumps(record))
    data = [{"path": str(folder / "records.jsonl")}]
    path = write_config(
        folder, f"{run}-{rl}", rl=rl, datasets=data, test_datasets=data, sample_packing=False,
        output_dir=str(folder / run),
    )  # fmt: skip
    assert command("evaluate", str(path)) == 2
    said = capsys.readouterr().err
    assert f"found rl: {rl} in the file, rl: none in the receipt" in " ".join(said.split())
    assert "remove rl from the file" in said


def test_several_processes_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("evaluate", str(folder / "lora")) == 2
    assert "runs in one process" in capsys.readouterr().err


def test_the_standard_error_is_that_of_many_samples() -> None:
    import numpy

    draw = numpy.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        losses = DocumentLosses()
        losses.counts = draw.integers(5, 50, 40).tolist()
        level = draw.normal(2.0, 0.5, 40)  # a document's tokens are alike
        losses.sums = [float(n * at) for n, at in zip(losses.counts, level, strict=True)]
        means.append(losses.mean)
        errors.append(losses.standard_error)
    assert numpy.mean(errors) == pytest.approx(numpy.std(means), rel=0.1)
    single = DocumentLosses()
    single.sums, single.counts = [3.0], [2]
    assert single.standard_error is None
    assert single.mean == 1.5

"""The loss and rewards that `attnimg evaluate` prints for rl are those of training's evaluation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from tiny_preferences import labeled, pairs, write
from tiny_run import make_model

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}


def command(*arguments: str) -> int:
    from attnimg.__main__ import run

    return run(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and data."""
    folder = tmp_path_factory.mktemp("preferences")
    make_model(folder / "model")
    for name, count in (("train", 16), ("one", 5), ("two", 4)):
        write(folder / f"{name}-pairs.jsonl", pairs(count))
        write(folder / f"{name}-labeled.jsonl", labeled(count))
    return folder


def train(folder: Path, name: str, rl: str, **keys: Any) -> Path:
    """Train a run that evaluates at its end; return its config."""
    kind = "labeled" if rl == "kto" else "pairs"

    def data(part: str) -> dict[str, Any]:
        return {"path": str(folder / f"{part}-{kind}.jsonl")}

    values = {
        "base_model": str(folder / "model"), "output_dir": str(folder / name), "rl": rl,
        "rl_beta": 0.3, "learning_rate": 1e-2, "datasets": [data("train")],
        "test_datasets": [data("one"), data("two")],
        "sequence_len": 64, "micro_batch_size": 2, "max_steps": 3, "save_strategy": "no",
        "attn_implementation": "sdpa", "bf16": False, **keys,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    assert command("train", str(path)) == 0
    return path


def evaluated(run: Path) -> dict[str, float]:
    """Return the last evaluation of training."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if "eval_loss" in line)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert command("evaluate", "--json", *arguments) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("rl", "keys"),
    [
        pytest.param("dpo", {}, id="dpo"),
        pytest.param("ipo", LORA, id="ipo, an adapter"),
        pytest.param("orpo", LORA, id="orpo, an adapter"),
        pytest.param("kto", {}, id="kto"),
    ],
)
def test_the_values_are_those_at_the_end_of_training(
    folder: Path, rl: str, keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(folder, f"values-{rl}", rl, **keys)
    expected = evaluated(folder / f"values-{rl}")
    before = sorted(folder.rglob("*"))
    one, two, both = printed(capsys, str(folder / f"values-{rl}"))
    assert sorted(folder.rglob("*")) == before, "nothing is written"
    assert [part["dataset"] for part in (one, two, both)] == [
        "test_datasets[0]", "test_datasets[1]", "all",
    ]  # fmt: skip
    assert both["rl"] == rl
    assert both["loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    values = {key[5:]: value for key, value in expected.items() if key.startswith("eval_")}
    assert both["metrics"] == pytest.approx(
        {key: value for key, value in values.items() if key != "loss"}, rel=1e-3, abs=1e-5
    )
    assert {"rewards/margins", "rewards/chosen"} <= both["metrics"].keys()
    assert one["documents"] + two["documents"] == both["documents"]
    assert one["tokens"] + two["tokens"] == both["tokens"]
    start = printed(capsys, str(path), "--base")[-1]
    if rl == "dpo":
        assert start["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert start["metrics"]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert start["loss"] != pytest.approx(both["loss"], rel=1e-3)
    assert command("evaluate", str(path)) == 0
    assert f"all: {rl} loss {both['loss']:.4f}, " in capsys.readouterr().out


def test_the_reference_of_a_continued_adapter_is_that_adapter(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folder, "first", "dpo", **LORA)
    train(folder, "second", "dpo", **LORA, lora_model_dir=str(folder / "first"))
    both = printed(capsys, str(folder / "second"))[-1]
    expected = evaluated(folder / "second")
    assert both["loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert both["metrics"]["rewards/margins"] == pytest.approx(
        expected["eval_rewards/margins"], rel=1e-3, abs=1e-5
    )


@pytest.mark.parametrize(
    ("rl", "needs_base"),
    [
        pytest.param("kto", True, id="kto compares with its base model"),
        pytest.param("orpo", False, id="orpo has no reference"),
    ],
)
def test_a_full_run_is_compared_with_the_base_model_of_its_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rl: str, needs_base: bool
) -> None:
    base = Path(shutil.copytree(folder / "model", tmp_path / "model"))
    run = train(folder, f"base-{rl}", rl, base_model=str(base)).with_suffix("")
    expected = printed(capsys, str(run))[-1]
    at_base = printed(capsys, str(run), "--base")[-1]
    moved = shutil.copytree(base, tmp_path / "moved")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})

    for arguments, refuses in (((str(run),), needs_base), ((str(run), "--base"), True)):
        if not refuses:
            assert printed(capsys, *arguments)[-1] == expected
            continue
        assert command("evaluate", *arguments) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{base} is not the base model of {run}" in said
        assert "model.safetensors: found SHA-256" in said
        assert "run attnimg evaluate with --base-model and the folder of the model" in said
    found = ("--base-model", str(moved))
    assert printed(capsys, str(run), *found)[-1] == expected, "the advice helps"
    assert printed(capsys, str(run), "--base", *found)[-1] == {**at_base, "weights": str(moved)}


def test_texts_are_refused_for_a_run_with_rl(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = train(folder, "refused", "orpo")
    values = yaml.safe_load(path.read_text())
    (folder / "texts.jsonl").write_text(json.dumps({"text": "day night"}) + "\n")
    data = [{"path": str(folder / "texts.jsonl"), "type": "completion"}]
    del values["rl"], values["rl_beta"]
    path.write_text(yaml.safe_dump({**values, "datasets": data, "test_datasets": data}))
    assert command("evaluate", str(path)) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "found rl: none in the file, rl: orpo in the receipt" in said
    assert "set rl: orpo in the file" in said
    values |= {"base_model": str(folder / "refused"), "output_dir": str(folder / "none")}
    path.write_text(yaml.safe_dump({**values, "datasets": data, "test_datasets": data}))
    (part,) = printed(capsys, str(path))
    assert part["documents"] == 1, "the advice helps"

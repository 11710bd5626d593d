"""Which folders and configs name trained weights, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnimg.errors import AttnimgError
from attnimg.runs.folder import find_run

sys.path.append(str(Path(__file__).parents[2] / "fixtures"))
from tiny_run import config_for, make_model, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run with two checkpoints, below a folder with its base model."""
    folder = tmp_path_factory.mktemp("trained")
    make_model(folder / "model")
    run(folder, folder / "out", adapter="lora", max_steps=4, save_steps=2)
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of output_dir that a test may damage."""
    return Path(shutil.copytree(trained / "out", tmp_path / "out"))


def set_status(folder: Path, status: str) -> None:
    receipt = json.loads((folder / "receipt.json").read_text())
    (folder / "receipt.json").write_text(json.dumps(receipt | {"status": status}))


def refused(argument: Path, **options: Any) -> AttnimgError:
    with pytest.raises(AttnimgError) as caught:
        find_run(str(argument), command="merge", **options)
    return caught.value


def test_a_run_is_found_by_its_folder_a_checkpoint_or_its_config(
    trained: Path, tmp_path: Path
) -> None:
    config = config_for(trained, adapter="lora", output_dir=str(trained / "out"))
    written = tmp_path / "run.yaml"
    keys = config.model_dump(exclude_defaults=True, exclude_none=True)
    written.write_text(yaml.safe_dump(keys))
    for argument, folder in (
        (trained / "out", trained / "out"),
        (written, trained / "out"),
        (trained / "out/checkpoint-2", trained / "out/checkpoint-2"),
    ):
        found = find_run(str(argument), command="merge")
        assert (found.folder, found.kind) == (folder, "adapter")
        assert found.config.learning_rate == 1e-2
        assert found.config.base_model == str(trained / "model")
        assert [path.name for path in found.checkpoints] == ["checkpoint-2", "checkpoint-4"]
        assert found.receipt is not None
        assert not found.notes


def test_a_moved_base_model_is_found_by_its_content(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(trained / "model", tmp_path / "elsewhere")
    found = find_run(str(trained / "out"), command="merge", base_model=str(moved))
    assert found.config.base_model == str(moved)
    shutil.rmtree(moved)
    assert "pw12" not in str(refused(trained / "out", base_model="https://bob:pw12@host/x"))
    error = refused(trained / "out", base_model=str(moved))
    assert error.code == "base-model-differs"
    assert "--base-model" in error.do


@pytest.mark.parametrize(
    ("base", "first", "second"),
    [
        ("{folder}/gone", "run attnimg merge with --base-model", ""),
        ("gone", "run attnimg merge with --base-model", "run hf download gone"),
        ("models/gone", "run attnimg merge with --base-model", "run hf download models/gone"),
        ("org/model", "run hf download org/model, or attnimg merge with --base-model", ""),
    ],
)
def test_a_missing_base_model_that_may_be_a_folder_gets_advice_on_folders_first(
    copied: Path, monkeypatch: pytest.MonkeyPatch, base: str, first: str, second: str
) -> None:
    monkeypatch.chdir(copied)
    (copied / "models").mkdir()
    name = base.format(folder=copied)
    do = refused(copied, base_model=name).do
    assert do.startswith(first)
    assert second in do
    assert second or "; if " not in do


def test_another_base_model_is_refused(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(trained / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    error = refused(trained / "out", base_model=str(other))
    assert (error.code, error.exit_code) == ("base-model-differs", 2)
    assert "model.safetensors: found SHA-256" in error.why


def test_nothing_there_is_refused(trained: Path, tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").code == "no-run"
    assert "out exists" in refused(trained / "outt").do
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refused(tmp_path / "empty").why
    written = tmp_path / "run.yaml"
    written.write_text(
        "base_model: a/b\nlearning_rate: 1e-4\noutput_dir: never\n"
        "datasets: [{path: x, type: completion}]\n"
    )
    error = refused(written)
    assert error.do == f"run attnimg train {written}"
    written.write_text("base_model: a/b\n")
    assert refused(written).code == "missing-key"


@pytest.mark.parametrize("status", ["stopped", "failed", "running"])
def test_an_unfinished_run_names_its_newest_intact_checkpoint(copied: Path, status: str) -> None:
    set_status(copied, status)
    error = refused(copied)
    assert error.code == "run-not-finished"
    assert f"run attnimg merge {copied / 'checkpoint-4'}" in error.do
    found = find_run(str(copied / "checkpoint-4"), command="merge")
    assert found.folder == copied / "checkpoint-4", "the advice helps"
    with (copied / "checkpoint-4/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    error = refused(copied)
    assert f"run attnimg merge {copied / 'checkpoint-2'}" in error.do
    assert "checkpoint-4 damaged" in error.why
    for path in copied.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert refused(copied).do == "train it again"


def test_a_damaged_checkpoint_is_refused(copied: Path) -> None:
    with (copied / "checkpoint-4/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    error = refused(copied / "checkpoint-4")
    assert error.code == "damaged-checkpoint"
    assert "SHA-256" in error.why
    assert str(copied / "checkpoint-2") in error.do


@pytest.mark.parametrize("damage", ["cut off", "missing", "receipt"])
def test_damaged_weights_are_refused(copied: Path, damage: str) -> None:
    weights = copied / "adapter_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "receipt":
        (copied / "receipt.json").write_text("{")
    else:
        weights.write_bytes(weights.read_bytes()[:-8])
    assert refused(copied).code == "damaged-run"


@pytest.mark.parametrize(
    "values",
    [
        {"identity": "x"}, {"identity": {"model": {"x": 1}}}, {"identity": {"model": 3}},
        {"identity": {"model": {"files": {"a": 1}}}}, {"files": 5}, {"files": [1]},
        {"status": ["done"]}, {"data": 5}, {"dtype": {}}, {"config": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_receipt_with_wrong_types_is_refused(copied: Path, values: dict[str, Any]) -> None:
    receipt = json.loads((copied / "receipt.json").read_text())
    (copied / "receipt.json").write_text(json.dumps(receipt | values))
    assert refused(copied).code == "damaged-run"


def test_folders_of_other_programs_are_accepted(trained: Path, copied: Path) -> None:
    (copied / "receipt.json").unlink()
    for path in copied.glob("checkpoint-*"):
        shutil.rmtree(path)
    found = find_run(str(copied), command="chat")
    assert (found.kind, found.receipt) == ("adapter", None)
    assert found.config.base_model == str(trained / "model")
    assert "its training config is unknown" in found.notes[0]
    found = find_run(str(trained / "model"), command="chat")
    assert (found.kind, found.config.base_model) == ("model", str(trained / "model"))
    settings = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": None})
    )
    assert "names no base model" in refused(copied).why

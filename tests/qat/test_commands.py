"""Test the commands with qat: a run proves the rounding, and its loss is evaluated with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_model, sentences

FSDP = Path(__file__).parent / "sharded.py"


def command(*arguments: str) -> int:
    from attnimg.__main__ import run

    return run(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_model(folder / "model")
    texts = (json.dumps({"text": text}) + "\n" for text in sentences(80, seed=1))
    (folder / "data.jsonl").write_text("".join(texts))
    return folder


def config(folder: Path, name: str, **qat: Any) -> str:
    values = {
        "base_model": str(folder / "model"), "output_dir": str(folder / name),
        "datasets": [{"path": str(folder / "data.jsonl"), "type": "completion"}],
        "learning_rate": 1e-2, "val_set_size": 0.2, "sequence_len": 64, "sample_packing": True,
        "micro_batch_size": 2, "max_steps": 3, "save_strategy": "no", "bf16": False,
        "attn_implementation": "sdpa", "qat": {"weight_dtype": "int4", **qat},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize(("name", "first"), [("rounded", None), ("later", 2), ("never rounded", 3)])
def test_the_evaluated_loss_is_that_of_training(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, first: int | None
) -> None:
    rounding = {"activation_dtype": "int8", "fake_quant_after_n_steps": first}
    path = config(folder, name, **rounding)
    assert command("train", path) == 0
    receipt = json.loads((folder / name / "receipt.json").read_text())
    assert "qat" in [proof["backend"] for proof in receipt["other_proofs"]]
    capsys.readouterr()
    assert command("evaluate", "--json", str(folder / name)) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["loss"] == pytest.approx(receipt["metrics"]["eval_loss"], rel=1e-5)


def test_two_processes_round_as_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = config(folder, "two", activation_dtype="int8", fake_quant_after_n_steps=1)
    done = torchrun("-m", "attnimg", "train", path)
    assert done.returncode == 0, done.stderr
    receipt = json.loads((folder / "two/receipt.json").read_text())
    assert command("evaluate", "--json", str(folder / "two")) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line)["loss"] == pytest.approx(receipt["metrics"]["eval_loss"], rel=1e-5)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
         *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def test_sharded_weights_are_rounded_the_same() -> None:
    """FSDP2 on two processes; a run needs GPUs for it, the layers do not."""
    done = torchrun(str(FSDP))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "the same losses and weights"

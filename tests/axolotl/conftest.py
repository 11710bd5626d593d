"""Fixtures for axolotl: a tiny model, and configs for it. `make test/axolotl` runs the tests."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl_record import RECORD, described

ROOT = Path(__file__).parents[2]
EXAMPLE = yaml.safe_load((ROOT / "examples/trainer/axolotl.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class AxolotlRun:
    """A finished command of axolotl."""

    code: int
    log: str
    output_dir: Path

    @property
    def losses(self) -> list[float]:
        return [float(text) for text in re.findall(r"'loss': '([\d.]+)'", self.log)]


@pytest.fixture(scope="session")
def runs(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Yield the runs for the record, which is written with AXOLOTL_RECORD=1 if no test failed."""
    began, found = time.monotonic(), {}
    yield found
    if os.environ.get("AXOLOTL_RECORD") and not request.session.testsfailed:
        in_venv = sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*"))
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            **described(),
            "runs": found,
            "seconds": round(time.monotonic() - began),
            "venv_mb": round(in_venv / 1e6),
        }
        RECORD.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the demo's tokenizer and an untrained model of two small layers."""
    sys.path.insert(0, str(ROOT / "examples/demo"))
    demo: Any = importlib.import_module("prepare")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = demo.make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the proofs and the prepared dataset of all runs."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="session")
def example(model: Path, kept: Path) -> dict[str, Any]:
    """Return examples/trainer/axolotl.yaml for the tiny model."""
    return EXAMPLE | {
        "base_model": str(model),
        "datasets": [EXAMPLE["datasets"][0] | {"path": str(ROOT / EXAMPLE["datasets"][0]["path"])}],
        "dataset_prepared_path": str(kept / "prepared"),
        # One row, so that every backend packs the same rows.
        "micro_batch_size": 1,
        "max_steps": 5,
    }


@pytest.fixture(scope="session")
def axolotl(kept: Path) -> Callable[..., AxolotlRun]:
    """Return a function that runs a command of axolotl on a config."""

    def run(
        command: str, folder: Path, config: dict[str, Any], env: dict[str, str] | None = None
    ) -> AxolotlRun:
        folder.mkdir(exist_ok=True)
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(config | {"output_dir": str(folder / "out")}))
        launcher = ["--launcher", "python"] if command == "train" else []
        done = subprocess.run(
            [Path(sys.executable).with_name("axolotl"), command, str(file), *launcher],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
            env=os.environ | {
                "ATTNIMG_CACHE": str(kept), "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": "",
                "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            } | (env or {}),
        )  # fmt: skip
        return AxolotlRun(done.returncode, done.stdout, folder / "out")

    return run

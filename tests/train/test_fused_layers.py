"""Train with the liger keys: the model's own layers on a CPU, Liger's in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused-layers")
    tiny_run.make_tokenizer(folder / "model")
    tiny_run.make_model(folder / "model")
    texts = tiny_run.sentences(12, seed=3)
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def train(made: Path, name: str, *, interpreted: bool = False, **keys: Any) -> tuple[Any, Any, str]:
    values = {
        "base_model": str(made / "model"), "output_dir": str(made / name), "learning_rate": 1e-3,
        "datasets": [{"path": str(made / "data.jsonl"), "type": "completion"}], "bf16": False,
        "sequence_len": 16, "max_steps": 1, "save_strategy": "no", "attn_implementation": "sdpa",
        "attn_check_steps": 0, **keys,
    }  # fmt: skip
    (made / f"{name}.yaml").write_text(yaml.safe_dump(values))
    paths = [str(FIXTURES / "interpreted"), str(FIXTURES)] if interpreted else []
    environment = os.environ | {"ATTNIMG_CACHE": str(made / "cache")}
    environment["PYTHONPATH"] = ":".join([*paths, os.environ.get("PYTHONPATH", "")])
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", "attnimg", "train", str(made / f"{name}.yaml")],
        env=environment, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    receipt = json.loads((made / name / "receipt.json").read_text())
    return receipt, tiny_run.losses(made / name), " ".join(done.stderr.split())


def test_a_cpu_runs_the_model_s_own_layers_and_proves_the_optimizer(made: Path) -> None:
    keys = {"liger_rope": True, "liger_rms_norm": True, "optimizer": "adamw_8bit"}
    receipt, _, log = train(made, "own", **keys)
    assert "warning hint-not-used: liger_rope and liger_rms_norm: Liger's kernels run on" in log
    assert receipt["liger"] == {}
    assert [proof["backend"] for proof in receipt["other_proofs"]] == ["adamw_8bit"]
    assert receipt["other_proofs"][0]["reasons"] == []


def test_liger_s_own_kernels_train_under_lora_in_the_interpreter(made: Path) -> None:
    keys = {"adapter": "lora", "lora_target_linear": True}
    _, (loss,), _ = train(made, "lora", **keys)
    fused = {"liger_rms_norm": True, "liger_glu_activation": True}
    receipt, (fused_loss,), log = train(made, "fused", interpreted=True, **keys, **fused)
    assert "hint-not-used" not in log
    assert receipt["liger"] == {"rms_norm": "5 LlamaRMSNorm", "glu_activation": "2 LlamaMLP"}
    proven = [proof["backend"] for proof in receipt["other_proofs"]]
    assert proven == ["liger_rms_norm", "liger_glu_activation"]
    assert "liger_rms_norm: 5 LlamaRMSNorm" in log
    assert fused_loss == pytest.approx(loss, rel=1e-4)

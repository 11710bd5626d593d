"""What real runs leave behind, and how they fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from attnimg.errors import AttnimgError
from attnimg.train import fit
from attnimg.train.freed_memory import keep_freed_memory

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, losses, make_model, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def test_the_final_model_is_plain_transformers(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(tiny, tmp_path, max_steps=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert not [key for key in config if "attn_implementation" in key]
    assert result.files[0].name == "model.safetensors"
    assert all(path.is_file() for path in result.files)
    assert not (tmp_path / "training_args.bin").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("keys", "precision"),
    [
        pytest.param({"adapter": "lora"}, "float32", id="lora"),
        pytest.param({"adapter": "lora", "peft_use_dora": True}, "float32", id="dora"),
        pytest.param({"adapter": "qlora", "load_in_4bit": True}, "float32", id="qlora"),
        pytest.param({"adapter": "qlora", "load_in_4bit": True, "gradient_checkpointing": True},
                     "bfloat16", id="qlora in bfloat16 with gradient checkpointing"),
    ],
)  # fmt: skip
def test_the_adapter_learns_and_loads_with_plain_peft(
    tiny: Path, tmp_path: Path, keys: dict[str, Any], precision: str
) -> None:
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    run(tiny, tmp_path, engine={"precision": precision}, max_steps=8, **keys)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {"torch.float32"}
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize(
    "keys", [pytest.param({}, id="mixed"), pytest.param({"bf16": "full"}, id="full")]
)
def test_bfloat16_trains(tiny: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    run(tiny, tmp_path, engine={"precision": "bfloat16"}, **{"bf16": True, **keys})
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5


def test_a_run_on_a_cpu_keeps_freed_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu: list[bool] = []

    @contextmanager
    def noted(environ: Mapping[str, str], *, cpu: bool) -> Iterator[None]:
        on_cpu.append(cpu)
        with keep_freed_memory(environ, cpu=cpu):
            yield

    monkeypatch.setattr(fit, "keep_freed_memory", noted)
    run(tiny, tmp_path, max_steps=2)
    assert on_cpu == [True]


def test_metrics_and_receipt_tell_the_run(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path, max_steps=5, logging_steps=2)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [1, 2, 4, 5], "the first, every second, the last"
    assert set(logged[0]) == {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
        "filled", "memory_bytes", "seconds", "attn_checks", "attn_margin",
    }  # fmt: skip
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["status"] == "done"
    assert receipt["metrics"]["loss"] == logged[-1]["loss"]
    assert receipt["metrics"]["tokens"] == logged[-1]["tokens"]
    assert receipt["plan"]["verdicts"][1]["reasons"] == [
        {"code": "fp8-arch", "text": "needs sm_90"}
    ]
    assert receipt["packing"]["train"]["filled_share"] > 0.9
    assert receipt["versions"]["trl"]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({}, id="all"),
        pytest.param({"adapter": "lora"}, id="lora"),
        pytest.param({"adapter": "qlora"}, id="4 bits"),
        pytest.param({"adapter": "lora", "lora_modules_to_save": ["lm_head"]}, id="and a module"),
    ],
)
def test_the_trained_weights_are_counted_before_the_first_step(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: dict[str, Any]
) -> None:
    from safetensors.torch import load_file

    run(tiny, tmp_path, max_steps=1, **keys)
    loaded = load_file(tiny / "model/model.safetensors")
    base = sum(weight.numel() for weight in loaded.values())
    file = "adapter_model" if keys else "model"
    saved = sum(weight.numel() for weight in load_file(tmp_path / f"{file}.safetensors").values())
    replaced = loaded["lm_head.weight"].numel() if "lora_modules_to_save" in keys else 0
    expected = (saved, base + saved - replaced) if keys else (base, base)
    counts = json.loads((tmp_path / "receipt.json").read_text())["weights"]
    assert (counts["trained"], counts["all"]) == expected
    said = capsys.readouterr().err
    assert f"weights: trains {expected[0]:,} of {expected[1]:,} (" in said
    assert said.index("weights: trains") < said.index("step 1/1")


def test_a_loss_that_is_no_number_stops_the_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaModel

    forward, calls = LlamaModel.forward, []

    def broken(self: Any, *args: Any, **options: Any) -> Any:
        calls.extend([1] * self.training)
        output = forward(self, *args, **options)
        if len(calls) == 1 + 4:  # the loss comparison calls it once in train mode
            output.last_hidden_state = output.last_hidden_state * float("nan")
        return output

    monkeypatch.setattr(LlamaModel, "forward", broken)
    with pytest.raises(AttnimgError, match="NaN or inf at step 4") as caught:
        run(tiny, tmp_path, save_steps=1)
    assert (caught.value.code, caught.value.exit_code) == ("not-finite", 1)
    assert "sdpa" in caught.value.why
    assert "checkpoint-3" in caught.value.why
    assert not (tmp_path / "checkpoint-4").exists()
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["status"], receipt["error"]["code"]) == ("failed", "not-finite")


def test_early_stopping_keeps_the_best_checkpoint(tiny: Path, tmp_path: Path) -> None:
    result = run(
        tiny, tmp_path, learning_rate=1e-12, max_steps=20, val_set_size=0.1, eval_steps=1,
        save_steps=1, save_total_limit=1, early_stopping_patience=2,
    )  # fmt: skip
    assert result.steps == 3, "the first is the best, two are no better"
    assert "the model is checkpoint-1" in result.notes[0]
    assert (tmp_path / "checkpoint-1").is_dir(), "rotation spares the best"


def test_a_finished_run_resumes_to_its_model(tiny: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2}
    run(tiny, tmp_path, **keys)
    weights, curve = (tmp_path / "model.safetensors").read_bytes(), losses(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    result = run(tiny, tmp_path, resume_from_checkpoint=True, **keys)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert losses(tmp_path) == curve
    assert result.steps == 4
    assert "done already" in result.notes[0]


def test_without_a_terminal_progress_is_a_few_plain_lines(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path, max_steps=30)
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert shown[0].startswith("step  1/30  loss")
    assert shown[-1].startswith("step 30/30  loss")
    assert len(shown) < 10
    assert "tok/s" in shown[0]
    assert "filled" in shown[0]

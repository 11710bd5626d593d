"""Runs whose loss is not TRL's alone: routers with an auxiliary loss, and heads that TRL misses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnimg.train import engine

sys.path.insert(0, str(Path(__file__).parents[1] / "fixtures"))
from tiny_models import tiny_model
from tiny_run import documents, lines, losses, make_tokenizer, run

pytestmark = pytest.mark.filterwarnings("ignore")
COEFFICIENT = 0.1


def save(folder: Path, model_type: str, **changes: Any) -> None:
    """Write model/ with the tokenizer of the data."""
    tokenizer = make_tokenizer(folder / "model")
    tiny_model(model_type, vocab_size=len(tokenizer), **changes).save_pretrained(folder / "model")


def plain_loss(folder: Path, *, validation: bool = False) -> tuple[float, float]:
    """Return the mean loss per token and the auxiliary loss of all documents as one batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    made = documents(AutoTokenizer.from_pretrained(folder), validation=True)
    split = made.validation if validation else made.train
    total, count = 0.0, 0
    for ids in split["input_ids"]:
        row = torch.tensor([ids])
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
        count += len(ids) - 1
    longest = max(map(len, split["input_ids"]))
    padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in split["input_ids"]])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids))
                         for ids in split["input_ids"]])  # fmt: skip
    with torch.no_grad():
        outputs = model(input_ids=padded, attention_mask=mask, use_cache=False)
    return total / count, float(getattr(outputs, "aux_loss", None) or 0.0)


ONE_BATCH: dict[str, Any] = {"max_steps": 1, "micro_batch_size": 200, "sample_packing": False,
                             "val_set_size": 0.1, "eval_steps": 1}  # fmt: skip


def run_once(folder: Path, **keys: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Train one step on all documents; return its line and the receipt."""
    run(folder, folder / "out", engine={"attention": "eager"}, **{**ONE_BATCH, **keys})
    line = next(line for line in lines(folder / "out") if "loss" in line)
    return line, json.loads((folder / "out/receipt.json").read_text())


def router_fields(config: Path) -> dict[str, Any]:
    found = json.loads(config.read_text())
    return {key: value for key, value in found.items() if "router" in key}


@pytest.fixture
def large_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let logits count as too large to keep, as with a real vocabulary."""
    monkeypatch.setattr(engine, "keeps_logits", lambda *_: False)


@pytest.mark.parametrize(
    ("model_type", "kept"),
    [("mixtral", False), ("mixtral", True), ("qwen3_moe", False), ("granitemoe", False)],
    ids=["mixtral", "mixtral with small logits", "qwen3_moe", "granitemoe"],
)
@pytest.mark.parametrize("asked", [True, False], ids=["auxiliary loss", "none asked for"])
def test_losses_of_a_mixture_of_experts_are_likelihoods(
    tmp_path: Path, request: pytest.FixtureRequest, model_type: str, kept: bool, asked: bool
) -> None:
    if not kept:
        request.getfixturevalue("large_logits")
    changes = {"output_router_logits": asked, "router_aux_loss_coef": COEFFICIENT}
    save(tmp_path, model_type, **changes)
    own, aux = plain_loss(tmp_path / "model")
    line, receipt = run_once(tmp_path)
    out = tmp_path / "out"
    assert line["loss"] == pytest.approx(own, abs=1e-5)
    evaluated = next(line for line in lines(out) if "eval_loss" in line)
    own_after, aux_after = plain_loss(out, validation=True)
    assert evaluated["eval_loss"] == pytest.approx(own_after, abs=1e-5)
    assert router_fields(out / "config.json") == router_fields(tmp_path / "model/config.json")
    if asked:
        assert line["aux_loss"] == pytest.approx(aux, abs=1e-4)
        assert evaluated["eval_aux_loss"] == pytest.approx(aux_after, abs=1e-4)
        assert receipt["metrics"]["aux_loss"] == line["aux_loss"]
        assert receipt["loss"]["aux_coefficient"] == COEFFICIENT
    else:
        assert "aux_loss" not in line
        assert "eval_aux_loss" not in evaluated
        assert receipt["loss"]["aux_coefficient"] is None
    # TRL's head reads num_experts, which granitemoe's config has not.
    head = "own" if kept or (asked and model_type == "granitemoe") else "chunked"
    assert receipt["loss"]["head"] == head


def gradient_norm(folder: Path) -> float:
    """Compute the norm of the gradient of plain transformers' own loss on all documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    rows = documents(AutoTokenizer.from_pretrained(folder / "model"), validation=False).train
    longest = max(map(len, rows["input_ids"]))
    pad = [longest - len(ids) for ids in rows["input_ids"]]
    ids = torch.tensor([row + [0] * n for row, n in zip(rows["input_ids"], pad, strict=True)])
    mask = torch.tensor([[1] * (longest - n) + [0] * n for n in pad])
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    norms = [w.grad.double().norm() for w in model.parameters() if w.grad is not None]
    return float(torch.stack(norms).norm())


def test_the_auxiliary_loss_takes_part_in_the_gradient(tmp_path: Path) -> None:
    save(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=1.0)
    line, _ = run_once(tmp_path, max_grad_norm=1e9)
    with_aux = gradient_norm(tmp_path)
    assert line["grad_norm"] == pytest.approx(with_aux, rel=1e-4)
    config = tmp_path / "model/config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "output_router_logits": False}))
    assert abs(gradient_norm(tmp_path) - with_aux) > 1e-3 * with_aux


def test_an_interrupted_window_logs_the_same_auxiliary_loss(tmp_path: Path) -> None:
    save(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=COEFFICIENT)
    keys: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "logging_steps": 4, "adapter": "lora"}
    weights = "adapter_model.safetensors"
    run(tmp_path, tmp_path / "out", **keys)
    whole = lines(tmp_path / "out")
    for name in ("checkpoint-4", weights):
        (tmp_path / "out" / name).rename(tmp_path / name)
    run(tmp_path, tmp_path / "out", resume_from_checkpoint=True, **keys)
    again = lines(tmp_path / "out")
    assert [line.get("aux_loss") for line in again] == [line.get("aux_loss") for line in whole]
    assert losses(tmp_path / "out") == [line["loss"] for line in whole]
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / weights).read_bytes()


def test_a_resumed_run_has_its_trained_experts(tmp_path: Path) -> None:
    save(tmp_path, "mixtral")
    keys: dict[str, Any] = {"max_steps": 3, "save_steps": 2}
    run(tmp_path, tmp_path / "out", **keys)
    whole, weights = losses(tmp_path / "out"), tmp_path / "out/model.safetensors"
    for path in (weights, tmp_path / "out/checkpoint-3"):
        if path.exists():
            path.rename(tmp_path / path.name)
    run(tmp_path, tmp_path / "out", resume_from_checkpoint=True, **keys)
    assert losses(tmp_path / "out") == whole
    assert weights.read_bytes() == (tmp_path / weights.name).read_bytes()


@pytest.mark.usefixtures("large_logits")
def test_a_capped_model_trains_on_its_own_logits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, "recurrent_gemma")
    line, receipt = run_once(tmp_path, gradient_accumulation_steps=1)
    assert "TRL's chunked head is not used" in capsys.readouterr().err
    assert receipt["loss"]["head"] == "own"
    assert line["loss"] == pytest.approx(plain_loss(tmp_path / "model")[0], abs=1e-5)
    evaluated = next(line for line in lines(tmp_path / "out") if "eval_loss" in line)
    after, _ = plain_loss(tmp_path / "out", validation=True)
    assert evaluated["eval_loss"] == pytest.approx(after, abs=1e-5)


def test_uneven_batches_count_each_token_once_in_any_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    save(tmp_path, "llama")
    line, _ = run_once(tmp_path, micro_batch_size=7, gradient_accumulation_steps=40)
    assert line["loss"] == pytest.approx(plain_loss(tmp_path / "model")[0], abs=1e-5)

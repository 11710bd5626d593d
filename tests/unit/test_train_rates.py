"""Test the learning rates and embedding noise of real runs."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attnimg.errors import AttnimgError

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
from tiny_run import lines, losses, make_model, run

RATE = 1e-3
HALF = RATE * (1 + math.cos(math.pi / 2)) / 2
QUARTER = RATE * (1 + math.cos(math.pi / 4)) / 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_model(folder / "model")
    return folder


def rates(out: Path) -> list[float]:
    return [line["learning_rate"] for line in lines(out) if "learning_rate" in line]


# Keys of a run of 8 steps, and the rates of its first steps.
RATES: dict[str, tuple[dict[str, Any], dict[int, float]]] = {
    "a quadratic warmup": (
        {"lr_quadratic_warmup": True, "warmup_steps": 4},
        {0: 0, 1: RATE / 16, 2: RATE / 4, 3: RATE * 9 / 16, 4: RATE, 5: QUARTER * 1, 6: HALF}),
    "a constant end": (
        {"cosine_min_lr_ratio": 0.2, "cosine_constant_lr_ratio": 0.5},
        {0: RATE, 1: 0.2 * RATE + 0.8 * QUARTER, 2: 0.2 * RATE + 0.8 * HALF, 4: 0.2 * RATE,
         7: 0.2 * RATE}),
    "a constant end after a warmup": (
        {"cosine_min_lr_ratio": 0.2, "cosine_constant_lr_ratio": 0.75, "warmup_steps": 2},
        {1: RATE / 2, 2: RATE, 4: 0.2 * RATE + 0.8 * HALF, 6: 0.2 * RATE, 7: 0.2 * RATE}),
    "a constant end before the end of the warmup": (
        {"cosine_min_lr_ratio": 0.2, "cosine_constant_lr_ratio": 0.25, "warmup_steps": 4},
        {2: RATE / 2, 4: 0.2 * RATE, 7: 0.2 * RATE}),
    "no constant end": (
        {"cosine_min_lr_ratio": 1.0, "cosine_constant_lr_ratio": 0}, {0: RATE, 7: RATE}),
    "a lowest rate": ({"eta_min": RATE / 2}, {0: RATE, 4: RATE / 2 + HALF / 2}),
    "a share of warmup": ({"warmup_steps": 0.5}, {0: 0, 2: RATE / 2, 4: RATE}),
}  # fmt: skip


@pytest.mark.parametrize("name", RATES)
def test_the_rates_of_a_run(tiny: Path, tmp_path: Path, name: str) -> None:
    keys, expected = RATES[name]
    run(tiny, tmp_path, max_steps=8, learning_rate=RATE, **keys)
    found = rates(tmp_path)
    assert {step: found[step] for step in expected} == pytest.approx(expected)
    used = json.loads((tmp_path / "receipt.json").read_text())["applied"]["scheduler"]
    warmup = keys.get("warmup_steps", 0)
    assert used["warmup_steps"] == (warmup if warmup >= 1 else 8 * warmup)


@pytest.mark.parametrize("name", ["a quadratic warmup", "a constant end after a warmup"])
def test_a_resumed_run_has_the_same_rates(tiny: Path, tmp_path: Path, name: str) -> None:
    keys = {"learning_rate": RATE, "save_steps": 3, **RATES[name][0]}
    run(tiny, tmp_path / "whole", max_steps=8, **keys)
    again = {"resume_from_checkpoint": str(tmp_path / "whole/checkpoint-3"), **keys}
    run(tiny, tmp_path / "resumed", max_steps=8, **again)
    assert rates(tmp_path / "resumed") == rates(tmp_path / "whole")[3:]
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[3:]


def test_noise_on_embeddings_in_training_alone(tiny: Path, tmp_path: Path) -> None:
    keys = {"learning_rate": 1e-12, "max_steps": 2, "val_set_size": 0.1, "eval_steps": 1}
    run(tiny, tmp_path / "without", **keys)
    for name in ("once", "twice"):
        run(tiny, tmp_path / name, neftune_noise_alpha=50, **keys)
    assert losses(tmp_path / "once") == losses(tmp_path / "twice")
    assert losses(tmp_path / "once")[0] != pytest.approx(losses(tmp_path / "without")[0], rel=1e-4)

    def evaluated(name: str) -> list[float]:
        return [line["eval_loss"] for line in lines(tmp_path / name) if "eval_loss" in line]

    assert evaluated("once") == pytest.approx(evaluated("without"), rel=1e-6)


def groups(out: Path) -> list[tuple[int, float, float]]:
    """Return tensors, base rate and weight decay of each group of weights, from the receipt."""
    applied = json.loads((out / "receipt.json").read_text())["applied"]
    rates = applied["scheduler"]["base_lrs"]
    return [(group["tensors"], rate, group["weight_decay"])
            for group, rate in zip(applied["groups"], rates, strict=True)]  # fmt: skip


def test_embeddings_have_a_rate_of_their_own(tiny: Path, tmp_path: Path) -> None:
    common = {"max_steps": 2, "learning_rate": RATE, "weight_decay": 0.1, "save_steps": 1}
    run(tiny, tmp_path / "scaled", embedding_lr_scale=0.5, **common)
    run(tiny, tmp_path / "same", embedding_lr=RATE / 2, **common)
    found = groups(tmp_path / "scaled")
    assert found == [(14, RATE, 0.1), (2, RATE / 2, 0.0), (5, RATE, 0.0)]
    assert groups(tmp_path / "same") == found
    assert losses(tmp_path / "same") == losses(tmp_path / "scaled")
    # Also after resuming, with another learning_rate.
    shutil.rmtree(tmp_path / "scaled/checkpoint-2")
    run(tiny, tmp_path / "scaled", embedding_lr_scale=0.5, resume_from_checkpoint=True,
        **{**common, "learning_rate": 4 * RATE})  # fmt: skip
    assert [rate for _, rate, _ in groups(tmp_path / "scaled")] == [4 * RATE, 2 * RATE, 4 * RATE]


def test_a_rate_of_embeddings_that_are_not_trained_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(AttnimgError, match="no embedding is trained") as caught:
        run(tiny, tmp_path, adapter="lora", embedding_lr=1e-5, max_steps=1)
    assert (caught.value.code, caught.value.key) == ("bad-value", "embedding_lr")
    run(tiny, tmp_path / "right", adapter="lora", lora_modules_to_save=["lm_head"],
        embedding_lr=1e-5, max_steps=1)  # fmt: skip
    assert groups(tmp_path / "right")[1][:2] == (1, 1e-5)


def test_loraplus_trains_b_faster(tiny: Path, tmp_path: Path) -> None:
    keys = {"adapter": "lora", "lora_target_modules": ["q_proj"], "loraplus_lr_ratio": 16,
            "learning_rate": RATE, "max_steps": 3, "save_steps": 1}  # fmt: skip
    run(tiny, tmp_path / "out", **keys)
    assert groups(tmp_path / "out") == [
        (2, RATE, 0.0), (0, 1e-6, 0.0), (2, 16 * RATE, 0.0), (0, 16 * RATE, 0.0)
    ]  # fmt: skip
    again = {**keys, "resume_from_checkpoint": str(tmp_path / "out/checkpoint-1")}
    run(tiny, tmp_path / "resumed", **again)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "out")[1:]


GROUPS = [{"name": "attention", "modules": ["q_proj", "layers.1.self_attn"], "lr": 1e-5},
          {"name": "mlp", "modules": ["self_attn", "up_proj"], "lr": 1e-6}]  # fmt: skip


def test_groups_of_weights_have_rates_of_their_own(tiny: Path, tmp_path: Path) -> None:
    common = {"max_steps": 2, "learning_rate": RATE, "weight_decay": 0.1, "save_steps": 1}
    run(tiny, tmp_path, lr_groups=GROUPS, **common)
    # Of the 14 weights with decay: 1 + 4 in the first group; 3 + 2 of the rest in the second.
    expected = [(4, RATE, 0.1), (2, RATE, 0.0), (5, RATE, 0.0), (5, 1e-5, 0.1), (5, 1e-6, 0.1)]
    assert groups(tmp_path) == expected
    # After resuming with another learning_rate, they keep theirs.
    shutil.rmtree(tmp_path / "checkpoint-2")
    run(tiny, tmp_path, lr_groups=GROUPS, resume_from_checkpoint=True,
        **{**common, "learning_rate": 4 * RATE})  # fmt: skip
    rates = [rate for _, rate, _ in groups(tmp_path)]
    assert rates == [4 * RATE, 4 * RATE, 4 * RATE, 1e-5, 1e-6]


def test_a_group_changes_what_its_weights_learn(tiny: Path, tmp_path: Path) -> None:
    slow = [{"name": "slow", "modules": ["up_proj"], "lr": 1e-30}]
    run(tiny, tmp_path, lr_groups=slow, max_steps=2, learning_rate=RATE, weight_decay=0.0)
    before, after = (load_file(place / "model.safetensors") for place in (tiny / "model", tmp_path))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in before if "up_proj" in name} == before.keys() - changed


def test_a_group_without_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    wrong = [*GROUPS, {"name": "again", "modules": ["k_proj", "embed_tokens"], "lr": 1e-5}]
    with pytest.raises(AttnimgError, match="again has no effect") as caught:
        run(tiny, tmp_path, lr_groups=wrong, max_steps=1)
    assert (caught.value.code, caught.value.key) == ("bad-value", "lr_groups")
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value.why)


ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd": ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    "adagrad": ({"lr_decay": 0.5, "eps": 1e-3}, {"lr_decay": 0.5, "eps": 1e-3}),
    "rmsprop": ({"momentum": 0.5, "alpha": 0.5, "centered": True, "eps": 1e-3},
                {"momentum": 0.5, "alpha": 0.5, "centered": True, "eps": 1e-3}),
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ARGUMENTS)
def test_arguments_reach_the_optimizer_and_change_the_run(
    tiny: Path, tmp_path: Path, optimizer: str
) -> None:
    given, expected = ARGUMENTS[optimizer]
    common = {"max_steps": 4, "learning_rate": RATE, "optimizer": optimizer}
    run(tiny, tmp_path / "without", **common)
    run(tiny, tmp_path / "with", optim_args=given, **common)
    text = ", ".join(f"{name}={value}" for name, value in given.items())
    run(tiny, tmp_path / "text", optim_args=text, **common)
    (group, *_) = json.loads((tmp_path / "with/receipt.json").read_text())["applied"]["groups"]
    assert {name: group[name] for name in expected} == expected
    assert losses(tmp_path / "text") == losses(tmp_path / "with")
    assert losses(tmp_path / "with")[-1] != losses(tmp_path / "without")[-1]

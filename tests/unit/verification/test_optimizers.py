"""Test the proof of optimizers with quantized states: right ones pass, wrong ones are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from attnimg.facts import Arch, DType, Machine
from attnimg.run_facts import OptimizerTask
from attnimg.verification import optimizers
from attnimg.verification.layers import TaskResult
from attnimg.verification.optimizers import prove_optimizer
from attnimg.verification.proofs import Setting
from attnimg.verification.task_proofs import prove_tasks


def task(
    optimizer: str = "adamw_8bit",
    *,
    dtype: DType = "float32",
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.999),
) -> OptimizerTask:
    return OptimizerTask(optimizer=optimizer, dtype=dtype, weight_decay=weight_decay,
                         beta1=betas[0], beta2=betas[1], epsilon=1e-8)  # fmt: skip


def prove(one: OptimizerTask) -> TaskResult:
    return prove_optimizer(one, device="cpu", on_case=lambda _: None)


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_bnb_8bit", "lion_8bit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("weight_decay", "betas"), [(0.0, (0.9, 0.999)), (0.1, (0.95, 0.98)), (0.01, (0.9, 0.95))]
)
def test_bitsandbytes_passes_on_a_cpu(
    optimizer: str, dtype: DType, weight_decay: float, betas: tuple[float, float]
) -> None:
    one = task(optimizer, dtype=dtype, weight_decay=weight_decay, betas=betas)
    found = prove(one)
    assert found.reasons == []
    assert max(figure.error / figure.allowed for figure in found.figures) < 0.8


class Adam(torch.optim.Optimizer):
    """AdamW with one mistake."""

    def __init__(self, groups: list[optimizers.Group], wrong: str, one: OptimizerTask) -> None:
        super().__init__(
            [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups],
            {"lr": optimizers.LEARNING_RATE},
        )
        self.wrong, self.one = wrong, one
        self.shared: dict[Any, Any] = {}
        self.first_rate: float | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.first_rate is None:
            self.first_rate = self.param_groups[0]["lr"]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
                elif self.wrong == "decay without a gradient":
                    weight.mul_(1 - group["lr"] * group["weight_decay"])

    def update(self, weight: Any, group: dict[str, Any]) -> None:
        wrong, one = self.wrong, self.one
        first, second = one.beta1, one.beta2
        if wrong == "betas exchanged":
            first, second = second, first
        lr = group["lr"] * (1.05 if wrong == "5 percent more" else 1.0)
        if wrong == "the first learning rate":
            lr = self.first_rate
        decay = group["weight_decay"]
        if wrong == "decay of the first group":
            decay = self.param_groups[0]["weight_decay"]
        gradient = weight.grad
        if wrong == "nothing beyond 65,536 numbers":
            gradient = gradient.clone()
            gradient.view(-1)[65536:] = 0
        if wrong == "decay in the gradient":
            gradient = gradient + decay * weight
        state = self.state[weight]
        if wrong == "states shared by shape":
            state = self.shared.setdefault((weight.shape, weight.dtype), state)
        counted = self.shared if wrong == "steps counted by all weights" else state
        steps = counted["steps"] = counted.get("steps", 0) + 1
        mean = state.setdefault("mean", torch.zeros_like(weight))
        square = state.setdefault("square", torch.zeros_like(weight))
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        if wrong == "one scale for all":
            for value in (mean, square):
                scale = value.abs().max() / 127
                value.copy_((value / scale).round() * scale)
        if wrong == "states of the first block":
            flat = square.view(-1)
            flat[256:].copy_(flat[:256].repeat(len(flat) // 256 + 1)[: len(flat) - 256])
        here, there = 1 - first**steps, 1 - second**steps
        if wrong == "no bias correction":
            here = there = 1.0
        if wrong != "decay in the gradient" and wrong != "no decay":
            weight.mul_(1 - lr * decay)
        weight.sub_(lr * (mean / here) / ((square / there).sqrt() + one.epsilon))
        if wrong == "NaN":
            weight.view(-1)[0] = float("nan")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "wrong",
    ["betas exchanged", "decay in the gradient", "no decay", "one scale for all", "5 percent more",
     "states of the first block", "no bias correction", "NaN", "the first learning rate",
     "steps counted by all weights", "states shared by shape", "nothing beyond 65,536 numbers",
     "decay of the first group", "decay without a gradient"],
)  # fmt: skip
def test_a_wrong_optimizer_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: str, dtype: DType
) -> None:
    monkeypatch.setattr(optimizers, "build_optimizer", lambda g, one: Adam(g, wrong, one))
    found = prove(task(dtype=dtype))
    assert found.reasons, wrong
    assert {reason.code for reason in found.reasons} == {"optimizer-wrong"}
    # The figure that is reported is a wrong one: max() ignores NaN.
    (figure,) = found.figures
    assert not figure.error <= figure.allowed or wrong != "NaN"


@pytest.mark.parametrize(
    "wrong",
    ["the first learning rate", "states shared by shape", "nothing beyond 65,536 numbers",
     "steps counted by all weights"],
)  # fmt: skip
def test_a_wrong_optimizer_is_refused_with_the_bounds_of_4_bits(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(optimizers, "build_optimizer", lambda g, one: Adam(g, wrong, one))
    assert prove(task("adamw_torch_4bit")).reasons


def test_an_exact_optimizer_written_in_another_way_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "build_optimizer", lambda g, one: Adam(g, "", one))
    assert prove(task()).reasons == []
    # What is right for 8 bits is right for 4, whose bounds are wider.
    assert prove(task("adamw_torch_4bit")).reasons == []


def test_the_proof_runs_in_a_child_process_and_is_kept(tmp_path: Path) -> None:
    machine = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="CPU", packages=None)
    setting = Setting(machine=machine, environment=os.environ, folder=tmp_path)
    log: list[str] = []
    found = [prove_tasks([task()], setting=setting, log=log.append)[0] for _ in range(2)]
    assert [(proof.backend, proof.passed, proof.cached) for proof in found] == [
        ("adamw_8bit", True, False), ("adamw_8bit", True, True)]  # fmt: skip

"""Prove an optimizer whose states are quantized: ten steps against its exact form in float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnimg.facts import Figure, OptimizerTask, Reason
from attnimg.verification.layers import TaskResult

STEPS = 10

# Bits of the states -> how far the sum of ten updates may be from the exact one, as a share of it,
# beyond the error of exact states in the same precision of weights; and how far the factor that
# fits it best may be from 1. Our choice, from the errors of correct ones on a CPU: 8 bits of
# bitsandbytes 0.50.2 and torchao 0.18.0 by 0.06 and 0.003, 4 bits of torchao by 0.5 and 0.24
# (2026-11-27).
UPDATE = {8: 0.12, 4: 0.8}
FACTOR_OFF = {8: 0.015, 4: 0.4}

# Shapes of the weights: whole blocks of quantization and a rest, in any case beyond the 4,096
# numbers from which bitsandbytes quantizes; and a small weight, whose states stay float32.
SHAPES = ((64, 128), (96, 257), (33,))

# The learning rate, which only scales updates. That of a run may be so small that bfloat16 rounds
# most updates of a step away.
LEARNING_RATE = 1e-3


def prove_optimizer(
    task: OptimizerTask, *, device: str, on_case: Callable[[str], None]
) -> TaskResult:
    """Compare ten steps of an optimizer with those of its exact form.

    Args:
        task: the optimizer and its settings.
        device: "cpu" or "cuda".
        on_case: called with the name of each case before it runs.

    Raises:
        Exception: whatever the optimizer raises.
    """
    figures, reasons = [], []
    bits = 4 if "4bit" in task.optimizer else 8
    # Large float32 weights, so that decay and Adam's update are of one size; then the run's dtype.
    large = 0.5 / max(task.weight_decay, 0.01)
    for shape, dtype, size_of_weights in (
        *((shape, "float32", large) for shape in SHAPES),
        *((shape, task.dtype, 0.02) for shape in SHAPES),
    ):
        name = f"{task.optimizer}: {STEPS} steps, {' x '.join(map(str, shape))} {dtype} weights"
        on_case(name)
        weight, gradients = _draw(shape, getattr(torch, dtype), size_of_weights, device=device)
        found = _updates(build_optimizer, weight, gradients, task)
        plain = _updates(_build_exact, weight, gradients, task)
        exact = _updates(_build_exact, weight.double(), [g.double() for g in gradients], task)
        size = exact.norm().item()
        rounding = (plain - exact).norm().item() / size
        error = (found - exact).norm().item() / size
        factor = abs(((found - plain) * exact).sum().item() / size**2)
        allowed = UPDATE[bits] + 1.5 * rounding
        figures.append(Figure(quantity="update", error=error, allowed=allowed, case=name))
        if not error <= allowed:
            text = f"{name}: the update is {error:.1%} off the exact one, allowed {allowed:.1%}"
            reasons.append(Reason(code="optimizer-wrong", text=text))
        elif not factor <= FACTOR_OFF[bits]:
            off = f"{factor:.1%} too large or small, allowed {FACTOR_OFF[bits]:.1%}"
            text = f"{name}: the update is {off}"
            reasons.append(Reason(code="optimizer-wrong", text=text))
    worst = max(figures, key=lambda figure: figure.error / figure.allowed)
    return TaskResult([worst], reasons, len(figures))


def _draw(
    shape: tuple[int, ...], dtype: torch.dtype, large: float, *, device: str
) -> tuple[Tensor, list[Tensor]]:
    """Draw a weight, and gradients with a constant part and noise, whose rows differ in size."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    constant, size = normal(), normal().mul(0.5).exp()
    if len(shape) > 1:
        size = size * normal()[:, :1].exp()
    # Steps of different sizes: how long a state remembers them shows its beta.
    gradients = [
        0.01 * (0.2, 1.0, 3.0)[step % 3] * size * (constant + normal()) for step in range(STEPS)
    ]
    return (large * normal()).to(device, dtype), [g.to(device, dtype) for g in gradients]


def _updates(
    build: Callable[[list[nn.Parameter], OptimizerTask], Any],
    weight: Tensor,
    gradients: list[Tensor],
    task: OptimizerTask,
) -> Tensor:
    """Return by how much the steps of an optimizer changed a weight, in float64."""
    parameter = nn.Parameter(weight.clone())
    optimizer = build([parameter], task)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach().double() - weight.double()


def build_optimizer(parameters: list[nn.Parameter], task: OptimizerTask) -> Any:
    """Return the optimizer as transformers' Trainer builds it."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, optim=task.optimizer, learning_rate=LEARNING_RATE,
            adam_beta1=task.beta1, adam_beta2=task.beta2, adam_epsilon=task.epsilon,
            use_cpu=parameters[0].device.type == "cpu", report_to=[],
        )  # fmt: skip
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind([{"params": parameters, "weight_decay": task.weight_decay}], **options)


def _build_exact(parameters: list[nn.Parameter], task: OptimizerTask) -> torch.optim.Optimizer:
    """Return the exact form: AdamW, or Lion."""
    betas = (task.beta1, task.beta2)
    if "lion" in task.optimizer:
        return _Lion(parameters, lr=LEARNING_RATE, betas=betas, decay=task.weight_decay)
    return torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=betas, eps=task.epsilon,
        weight_decay=task.weight_decay, foreach=False,
    )  # fmt: skip


class _Lion(torch.optim.Optimizer):  # type: ignore[misc]  # torch is Any here
    """Lion: the sign of an interpolated momentum.

    Source: https://arxiv.org/abs/2302.06675, algorithm 2 (2026-11-27)
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        decay: float,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is Any here
    def step(self, _closure: Any = None) -> None:
        """Update the weights once."""
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                direction = (first * momentum + (1 - first) * weight.grad).sign()
                weight.mul_(1 - lr * group["decay"]).sub_(lr * direction)
                momentum.mul_(second).add_(weight.grad, alpha=1 - second)

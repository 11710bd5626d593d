"""Prove an optimizer whose states are quantized: ten steps against its exact form in float64.

As in a run, an optimizer has many weights, some of one shape, in two groups with different decay;
the learning rate changes, and some weights have no gradient in some steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnimg.run_facts import Figure, OptimizerTask, Reason
from attnimg.verification.checks import margin
from attnimg.verification.layers import TaskResult

# Bits of the states -> how far the sum of ten updates may be from the exact one, as a share of it,
# beyond the error of exact states in the same precision of weights; and how far the factor that
# fits it best may be from 1. Our choice, from the errors of correct ones on a CPU: 8 bits of
# bitsandbytes 0.50.2 and torchao 0.18.0 by 0.08 and 0.002, 4 bits of torchao by 0.53 and 0.44
# (2026-11-27). Below 4,096 numbers, the states of both have 32 bits.
UPDATE = {32: 0.02, 8: 0.12, 4: 0.8}
FACTOR_OFF = {32: 0.015, 8: 0.015, 4: 0.6}
QUANTIZED = 4096

# Numbers of a weight that are compared at once, so that no part of a large one is left out.
COMPARED = 1 << 15

# The learning rate, which only scales updates. That of a run may be so small that bfloat16 rounds
# most updates of a step away. It changes as in a run, with a warmup and a decay.
LEARNING_RATE = 2e-3
RATES = (0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5)


class _Weight(NamedTuple):
    """A weight: its shape, the group that it is in, and the steps without a gradient."""

    shape: tuple[int, ...]
    group: int = 0
    without: tuple[int, ...] = ()


# Of the weights with 4,096 numbers and more, torchao quantizes the states of those with whole
# blocks of 256, and bitsandbytes also others. Two are larger than 2^17.
# Source: torchao 0.18.0, optim/adam.py, _new_buffer; bitsandbytes 0.50.2, optim/optimizer.py,
# min_8bit_size (2026-11-27)
WEIGHTS = (
    _Weight((64, 128)),
    _Weight((64, 128)),
    _Weight((96, 257), without=(0, 4, 7)),
    _Weight((96, 257), group=1),
    _Weight((64, 128), group=1, without=(2, 3)),
    _Weight((361, 367)),
    _Weight((576, 256)),
    _Weight((333,), group=1),
    _Weight((333,), group=1, without=(5,)),
)


class Group(NamedTuple):
    """Weights with one decay."""

    parameters: list[nn.Parameter]
    weight_decay: float


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
    for dtype, size_of_weights in (("float32", large), (task.dtype, 0.02)):
        case = f"{task.optimizer}: {len(RATES)} steps of {len(WEIGHTS)} {dtype} weights"
        on_case(case)
        drawn = _draw(getattr(torch, dtype), size_of_weights, device=device)
        found = _updates(build_optimizer, drawn, task)
        plain = _updates(_build_exact, drawn, task)
        exact = _updates(_build_exact, drawn, task, in_float64=True)
        for number, weight in enumerate(WEIGHTS):
            shape = " x ".join(map(str, weight.shape))
            name = f"{case}, weight {number + 1} of {shape}"
            results = (found[number], plain[number], exact[number])
            kept = bits if exact[number].numel() >= QUANTIZED else 32
            for part in zip(*(result.split(COMPARED) for result in results), strict=True):
                figure, text = _judge(*part, bits=kept, name=name)
                figures.append(figure)
                if text:
                    reasons.append(Reason(code="optimizer-wrong", text=f"{name}: {text}"))
                    break
    worst = max(figures, key=margin)
    return TaskResult([worst], reasons, len(figures))


def _judge(
    found: Tensor, plain: Tensor, exact: Tensor, *, bits: int, name: str
) -> tuple[Figure, str]:
    """Compare updates with the exact ones; return the broken rule in words, or ""."""
    size = exact.norm().item()
    rounding = (plain - exact).norm().item() / size
    error = (found - exact).norm().item() / size
    off = abs(((found - plain) * exact).sum().item() / size**2)
    allowed = UPDATE[bits] + 1.5 * rounding
    text = ""
    if not error <= allowed:
        text = f"the update is {error:.1%} off the exact one, allowed {allowed:.1%}"
    elif not off <= FACTOR_OFF[bits]:
        text = f"the update is {off:.1%} too large or small, allowed {FACTOR_OFF[bits]:.1%}"
    return Figure(quantity="update", error=error, allowed=allowed, case=name), text


class _Drawn(NamedTuple):
    """A weight and its gradients; None in the steps without one."""

    value: Tensor
    gradients: list[Tensor | None]


def _draw(dtype: torch.dtype, large: float, *, device: str) -> list[_Drawn]:
    """Draw weights, and gradients with a constant part and noise, whose rows differ in size."""
    generator = torch.Generator().manual_seed(0)

    def draw(weight: _Weight) -> _Drawn:
        def normal() -> Tensor:
            return torch.randn(weight.shape, generator=generator, dtype=torch.float64)

        constant, size = normal(), normal().mul(0.5).exp()
        if len(weight.shape) > 1:
            size = size * normal()[:, :1].exp()
        # Steps of different sizes: how long a state remembers them shows its beta.
        gradients = [
            0.01 * (0.2, 1.0, 3.0)[step % 3] * size * (constant + normal())
            for step in range(len(RATES))
        ]
        return _Drawn(
            (large * normal()).to(device, dtype),
            [
                None if step in weight.without else gradient.to(device, dtype)
                for step, gradient in enumerate(gradients)
            ],
        )

    return [draw(weight) for weight in WEIGHTS]


def _updates(
    build: Callable[[list[Group], OptimizerTask], Any],
    drawn: list[_Drawn],
    task: OptimizerTask,
    *,
    in_float64: bool = False,
) -> list[Tensor]:
    """Return by how much the steps of an optimizer changed each weight, in float64."""
    dtype = torch.float64 if in_float64 else drawn[0].value.dtype
    parameters = [nn.Parameter(one.value.to(dtype, copy=True)) for one in drawn]
    decays = (task.weight_decay, 0.0 if task.weight_decay else 0.1)
    groups = [
        Group([p for p, weight in zip(parameters, WEIGHTS, strict=True) if weight.group == place],
              decay)
        for place, decay in enumerate(decays)
    ]  # fmt: skip
    optimizer = build(groups, task)
    # A scheduler sets the rate of the next step too, also after the last one.
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (*RATES, 0.0)[step])
    for step in range(len(RATES)):
        for parameter, one in zip(parameters, drawn, strict=True):
            gradient = one.gradients[step]
            parameter.grad = None if gradient is None else gradient.to(dtype, copy=True)
        optimizer.step()
        rates.step()
    return [
        (parameter.detach().double() - one.value.double()).flatten()
        for parameter, one in zip(parameters, drawn, strict=True)
    ]


def build_optimizer(groups: list[Group], task: OptimizerTask) -> Any:
    """Return the optimizer as transformers' Trainer builds it."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, optim=task.optimizer, learning_rate=LEARNING_RATE,
            adam_beta1=task.beta1, adam_beta2=task.beta2, adam_epsilon=task.epsilon,
            use_cpu=groups[0].parameters[0].device.type == "cpu", report_to=[],
        )  # fmt: skip
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(_as_dicts(groups), **options)


def _as_dicts(groups: list[Group]) -> list[dict[str, Any]]:
    return [{"params": one.parameters, "weight_decay": one.weight_decay} for one in groups]


def _build_exact(groups: list[Group], task: OptimizerTask) -> torch.optim.Optimizer:
    """Return the exact form: AdamW, or Lion."""
    betas = (task.beta1, task.beta2)
    if "lion" in task.optimizer:
        return _Lion(_as_dicts(groups), lr=LEARNING_RATE, betas=betas)
    return torch.optim.AdamW(
        _as_dicts(groups), lr=LEARNING_RATE, betas=betas, eps=task.epsilon, foreach=False
    )


class _Lion(torch.optim.Optimizer):  # type: ignore[misc]  # torch is Any here
    """Lion: the sign of an interpolated momentum.

    Source: https://arxiv.org/abs/2302.06675, algorithm 2 (2026-11-27)
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()  # type: ignore[untyped-decorator]  # torch is Any here
    def step(self, _closure: Any = None) -> None:
        """Update the weights once."""
        for group in self.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight))
                direction = (first * momentum + (1 - first) * weight.grad).sign()
                weight.mul_(1 - lr * group["weight_decay"]).sub_(lr * direction)
                momentum.mul_(second).add_(weight.grad, alpha=1 - second)

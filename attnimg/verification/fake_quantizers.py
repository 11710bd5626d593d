"""Prove the layers that simulate a later quantization, against its definition in float64.

A layer is replaced as in a run, and called forward and backward. Its outputs must be those of
weights and inputs that are rounded by the definition; its gradients those that pass through the
rounding unchanged. With int8 inputs, the layer that torchao quantizes for inference must have the
same outputs too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnimg.fake_quantization import (
    embedding_quantization,
    insert_fake_quantizers,
    is_embedding,
    quantization,
)
from attnimg.run_facts import Figure, QatTask, Reason
from attnimg.verification.checks import margin
from attnimg.verification.layers import TaskResult

# Precision -> how far outputs may be off, as a share of the rounding that they simulate; the same
# where only inputs are rounded; and how far gradients, as a share of them. Our choice, twice the
# largest of torchao 0.18.0 on a CPU with groups of 16 to 256, and in float32 enough for TF32:
# outputs by 4e-6, 0.19 and 0.32, of inputs 2e-5, 0.29 and 1.3, gradients by 3e-7, 0.022 and 0.037
# (2026-11-28). In 16 bits scales are rounded too: for inputs, by more than the inputs themselves.
# A quantized layer has the same scales.
OUTPUT = {"float32": 0.02, "float16": 0.4, "bfloat16": 0.6}
INPUT = {"float32": 0.02, "float16": 0.6, "bfloat16": 2.6}
GRADIENT = {"float32": 2e-3, "float16": 0.05, "bfloat16": 0.08}
# How far outputs may be from those of the quantized layer. On a CPU they are the same numbers.
QUANTIZED = 0.01

# Rows of a weight, and tokens of two batches. A weight has at least two groups and 256 columns.
ROWS, TOKENS, COLUMNS = 96, (2, 37), 256


def prove_fake_quantizers(
    task: QatTask, *, device: str, on_case: Callable[[str], None]
) -> TaskResult:
    """Compare layers with fake quantizers with their definition, forward and backward.

    Args:
        task: how to round.
        device: "cpu" or "cuda".
        on_case: called with the name of each case before it runs.

    Raises:
        Exception: whatever torchao raises.
    """
    figures: list[Figure] = []
    reasons: list[Reason] = []

    def judge(case: str, compared: Iterator[tuple[str, float, float]]) -> None:
        for quantity, error, allowed in compared:
            figures.append(Figure(quantity=quantity, error=error, allowed=allowed, case=case))
            if not error <= allowed:
                of = "its size" if quantity.startswith("gradient") else "the simulated rounding"
                text = f"{case}: the {quantity} is {error:.3g} of {of} off, allowed {allowed:.3g}"
                reasons.append(Reason(code="qat-wrong", text=text))

    for dtype in dict.fromkeys(("float32", task.dtype)):
        for name in ("without a bias", "with a bias", "one-hot weights"):
            case = f"qat: {dtype} layer, {name}"
            on_case(case)
            judge(case, _compare_linear(task, dtype, name, device=device))
        if task.embeddings:
            case = f"qat: {dtype} embedding"
            on_case(case)
            judge(case, _compare_embedding(task, dtype, device=device))
    worst = max(figures, key=margin)
    return TaskResult([worst], reasons, len(figures))


class _Gradients(NamedTuple):
    """The output of a call, and the gradients of weight, input and bias, in float64."""

    output: Tensor
    weight: Tensor
    input: Tensor
    bias: Tensor | None


def _compare_linear(
    task: QatTask, dtype: str, name: str, *, device: str
) -> Iterator[tuple[str, float, float]]:
    """Compare one linear layer; yield each quantity, its error and the allowed one."""
    columns = task.group_size * max(2, COLUMNS // task.group_size)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(device, getattr(torch, dtype))

    one_hot = name == "one-hot weights"
    layer = nn.Linear(columns, ROWS, bias=name == "with a bias")
    layer.to(device, getattr(torch, dtype))
    with torch.no_grad():
        # Rows of different sizes, one of zeros, and one that is not around 0.
        weight = 0.02 * normal(ROWS, columns) * normal(ROWS, 1).exp()
        weight[0], weight[1] = 0, weight[1] + 0.1
        if one_hot:
            # The rounding of a weight's only number is known, so what differs is that of inputs.
            weight = 0.5 * torch.eye(ROWS, columns, device=device, dtype=weight.dtype)
        layer.weight.copy_(_with_positive_largest(weight, task.group_size))
        if layer.bias is not None:
            layer.bias.copy_(normal(ROWS))
    # Inputs of different sizes: one token of zeros, one of positive numbers, one with outliers.
    inputs = normal(*TOKENS, columns) * normal(*TOKENS, 1).exp()
    inputs[0, 0], inputs[0, 1] = 0, inputs[0, 1].abs() + 1
    inputs[0, 2, ::61] *= 50
    out = normal(*TOKENS, ROWS)
    fake = nn.Sequential(copy.deepcopy(layer))
    insert_fake_quantizers(fake, task)
    found = _call(fake, inputs, out)
    exact = [_reference(task, layer, inputs, out, moving=moving) for moving in (False, True)]
    wanted = exact[0].output
    weight_only = _without_input_rounding(task, layer, inputs)
    unrounded = weight_only if one_hot else _plain(layer, inputs)
    bound = (INPUT if one_hot and task.activation_dtype else OUTPUT)[dtype]
    size = (wanted - unrounded).norm().item() or wanted.norm().item()
    yield "output", (found.output - wanted).norm().item() / size, bound
    clamped = _is_largest(layer.weight, task.group_size)
    for quantity in ("weight", "input", "bias") if layer.bias is not None else ("weight", "input"):
        value, *results = (getattr(one, quantity) for one in (found, *exact))
        if quantity == "weight":
            value, *results = (one.masked_fill(clamped, 0) for one in (value, *results))
        error = min((value - one).norm().item() / one.norm().item() for one in results)
        yield f"gradient of the {quantity}", error, GRADIENT[dtype]
    if task.activation_dtype and not one_hot:
        # The largest numbers are negative here: rounding may go either way, and must go one.
        with torch.no_grad():
            layer.weight.neg_()
            fake[0].weight.neg_()
            quantized = nn.Sequential(copy.deepcopy(layer))
            _quantize(quantized, quantization(task))
            error = (fake(inputs) - quantized(inputs)).double().norm().item() / size
        yield "output, compared with the quantized layer", error, QUANTIZED


def _compare_embedding(
    task: QatTask, dtype: str, *, device: str
) -> Iterator[tuple[str, float, float]]:
    """Compare an embedding with that which torchao quantizes, and its gradient; yield as above."""
    columns = 2 * task.group_size
    generator = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(ROWS, columns, device=device, dtype=getattr(torch, dtype))
    with torch.no_grad():
        drawn = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
        embedding.weight.copy_(_with_positive_largest(drawn, task.group_size))
    tokens = torch.randint(ROWS, TOKENS, generator=generator).to(device)
    fake, real = (nn.Sequential(copy.deepcopy(embedding)) for _ in range(2))
    insert_fake_quantizers(fake, task)
    output = fake(tokens)
    out = torch.randn(output.shape, generator=generator).to(device, output.dtype)
    output.backward(out)
    _quantize(real, embedding_quantization(task), is_embedding)
    rounded = _round_symmetric(embedding.weight.detach().double(), task.group_size)
    wanted, plain = rounded[tokens], embedding.weight.detach().double()[tokens]
    gradient = torch.zeros_like(rounded).index_add_(0, tokens.flatten(), out.double().flatten(0, 1))
    part = ~_is_largest(embedding.weight, task.group_size)
    with torch.no_grad():
        results = (
            ("output", output.double(), wanted, wanted - plain, OUTPUT[dtype]),
            ("output, compared with the quantized embedding", output.double(),
             real(tokens).double(), wanted - plain, QUANTIZED),
            ("gradient of the weight", fake[0].weight.grad.double() * part, gradient * part,
             gradient, GRADIENT[dtype]),
        )  # fmt: skip
    for quantity, found, needed, size, allowed in results:
        yield quantity, ((found - needed).norm() / size.norm()).item(), allowed


def _quantize(model: nn.Module, config: Any, kind: Callable[..., bool] | None = None) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, **({"filter_fn": kind} if kind else {}))


def _call(model: nn.Sequential, inputs: Tensor, out: Tensor) -> _Gradients:
    """Call a model of one layer; a gradient that it does not compute is 0."""
    leaf, layer = inputs.clone().requires_grad_(), model[0]
    output = model(leaf)
    if output.requires_grad:
        output.backward(out)
    weight, of_inputs, bias = (
        None if one is None else (torch.zeros_like(one) if one.grad is None else one.grad).double()
        for one in (layer.weight, leaf, layer.bias)
    )
    assert weight is not None
    assert of_inputs is not None
    return _Gradients(output.detach().double(), weight, of_inputs, bias)


def _plain(layer: nn.Linear, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        exact: Tensor = copy.deepcopy(layer).double()(inputs.double())
    return exact


def _without_input_rounding(task: QatTask, layer: nn.Linear, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        weight = _round_weight(task, layer.weight.detach().double(), moving=False)
        bias = layer.bias.double() if layer.bias is not None else None
        return nn.functional.linear(inputs.double(), weight, bias)


def _reference(
    task: QatTask, layer: nn.Linear, inputs: Tensor, out: Tensor, *, moving: bool
) -> _Gradients:
    """Return output and gradients by the definition.

    Args:
        task: how to round.
        layer: the layer without fake quantizers.
        inputs: its inputs.
        out: the gradient of its output.
        moving: whether the gradient also passes through the scales of weights.
    """
    weight = layer.weight.detach().double().requires_grad_()
    leaf = inputs.detach().double().requires_grad_()
    rounded = _round_inputs(leaf) if task.activation_dtype else leaf
    bias = layer.bias.detach().double() if layer.bias is not None else None
    output = nn.functional.linear(rounded, _round_weight(task, weight, moving=moving), bias)
    output.backward(out.double())
    assert weight.grad is not None
    assert leaf.grad is not None
    of_bias = out.double().sum((0, 1)) if bias is not None else None
    return _Gradients(output.detach(), weight.grad, leaf.grad, of_bias)


def _straight(exact: Tensor) -> Tensor:
    """Return the nearest integers; their gradient is that of the numbers."""
    return exact + (exact.round() - exact).detach()


def _round_weight(task: QatTask, weight: Tensor, *, moving: bool) -> Tensor:
    """Return a weight rounded to 16 numbers a group.

    Without int8 inputs they lie between the smallest and the largest number of the group; with
    them, at -8 to 7 times a scale of 1/7.5 of the largest absolute number.
    Source: torchao 0.18.0, quantization/qat/fake_quantizer.py, Int4WeightFakeQuantizer;
    quantization/quant_primitives.py, _choose_qparams_affine, symmetric (2026-11-28)
    """
    if task.activation_dtype:
        return _round_symmetric(weight, task.group_size)
    groups = weight.unflatten(-1, (-1, task.group_size))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low).clamp_min(1e-6) / 15
    if not moving:
        low, scale = low.detach(), scale.detach()
    return (_straight((groups - low) / scale).clamp(0, 15) * scale + low).flatten(-2)


def _with_positive_largest(weight: Tensor, group_size: int) -> Tensor:
    """Return a weight whose groups' largest absolute number is positive.

    Symmetric rounding puts it halfway between 7 and 8, which both become 7, and a negative one
    between -7 and -8, so that the order of operations decides.
    """
    groups = weight.unflatten(-1, (-1, group_size))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    return (groups * torch.where(largest < 0, -1, 1)).flatten(-2)


def _is_largest(weight: Tensor, group_size: int) -> Tensor:
    """Return where a number is the largest of its group; see _with_positive_largest."""
    groups = weight.detach().abs().unflatten(-1, (-1, group_size))
    return (groups == groups.amax(-1, keepdim=True)).flatten(-2)


def _round_symmetric(weight: Tensor, group_size: int) -> Tensor:
    """Return a weight rounded to -8 to 7 times a scale."""
    groups = weight.unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).detach().clamp_min(1e-30)
    return (_straight(groups / scale).clamp(-8, 7) * scale).flatten(-2)


def _round_inputs(inputs: Tensor) -> Tensor:
    """Return inputs rounded to 256 numbers a token, between its smallest and largest, 0 included.

    Source: torchao 0.18.0, quantization/quant_primitives.py, _choose_qparams_affine, asymmetric
    (2026-11-28)
    """
    low = inputs.detach().amin(-1, keepdim=True).clamp(max=0)
    high = inputs.detach().amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return ((_straight(inputs / scale) + zero).clamp(-128, 127) - zero) * scale

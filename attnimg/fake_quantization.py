"""Simulate the rounding of a later quantization in a model's layers, by torchao.

torchao's own function replaces linear layers, and embeddings, by ones that round their weights, and
their inputs, in the forward pass. The weights themselves keep their precision and names, and are
trained: the gradient passes through the rounding. How to round is inferred by torchao from the
settings of the quantization itself, so that both round alike. verification/fake_quantizers.py
proves it.

axolotl pairs the fake quantizers itself. With int8 inputs it rounds weights between the smallest
and the largest number of a group, as for kernels with bfloat16 inputs, while the quantization that
follows rounds symmetrically around 0. Its examples with nvfp4 raise in torchao; with mxfp4, biases
have no gradient.
Source: axolotl 0.19.0, utils/quantization.py, get_quantization_config and _make_qat_config; torchao
0.17.0 and 0.18.0, quantization/qat/fake_quantize_config.py, _infer_fake_quantize_configs;
prototype/qat/mx.py, backward (2026-11-28)
"""

from __future__ import annotations

from typing import Any

from attnimg.run_facts import QatTask


def quantization(task: QatTask) -> Any:
    """Return torchao's settings of the quantization of linear layers that is simulated."""
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, Int8DynamicActivationIntxWeightConfig
    from torchao.quantization.granularity import PerGroup

    if task.activation_dtype is None:
        return Int4WeightOnlyConfig(group_size=task.group_size)
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(task.group_size)
    )


def embedding_quantization(task: QatTask) -> Any:
    """Return torchao's settings of the quantization of embeddings, which has no inputs to round.

    Int4WeightOnlyConfig, which axolotl takes, is for linear layers.
    """
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(task.group_size))


def is_linear(module: Any, _name: str = "") -> bool:
    """Return whether a module is a linear layer."""
    import torch

    return isinstance(module, torch.nn.Linear)


def is_embedding(module: Any, _name: str = "") -> bool:
    """Return whether a module is an embedding."""
    import torch

    return isinstance(module, torch.nn.Embedding)


def insert_fake_quantizers(model: Any, task: QatTask) -> None:
    """Replace the linear layers of a model, and its embeddings where the task says so.

    Args:
        model: the model; the sizes of its layers are multiples of the group size.
        task: how to round.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    quantize_(model, QATConfig(quantization(task), step="prepare"), filter_fn=is_linear)
    if task.embeddings:
        config = QATConfig(embedding_quantization(task), step="prepare")
        quantize_(model, config, filter_fn=is_embedding)


def turn_fake_quantizers(model: Any, *, on: bool) -> int:
    """Turn the rounding on or off; return the number of fake quantizers."""
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    found = [module for module in model.modules() if isinstance(module, FakeQuantizerBase)]
    for module in found:
        module.enabled = on
    return len(found)


def rounding_layers(model: Any) -> dict[str, Any]:
    """Return the layers that have fake quantizers, by their names."""
    from torchao.quantization.qat.fake_quantizer import FakeQuantizerBase

    return {
        name: module
        for name, module in model.named_modules()
        if any(isinstance(part, FakeQuantizerBase) for part in module.children())
    }

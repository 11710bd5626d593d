"""Choose how a model computes its experts, and load their fused weights in 4 or 8 bits.

transformers keeps the experts of a layer in one tensor, which bitsandbytes does not quantize: it
replaces linear layers only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.errors import bad_value

if TYPE_CHECKING:
    import torch

# The implementations of transformers.
# Source: transformers 5.22.2, modeling_utils.py, get_correct_experts_implementation (2026-11-27).
IMPLEMENTATIONS = frozenset({"eager", "batched_mm", "grouped_mm"})


def experts_implementation(config: Config) -> str | None:
    """Return the implementation to load the model with; None for transformers' choice."""
    name = config.experts_implementation
    return name if name in IMPLEMENTATIONS else None


def require_experts(model: Any, config: Config) -> None:
    """Raise if experts_implementation is set, and has no effect on the model.

    Args:
        model: a transformers model, also one without weights.
        config: the validated run.

    Raises:
        AttnimgError: code bad-value.
    """
    name = experts_implementation(config)
    if name is None or experts_in_use(model):
        return
    raise bad_value(
        "experts_implementation",
        f"experts_implementation: {name} has no effect on this model",
        why=f"found no experts in {type(model).__name__} that transformers computes by it",
        do="remove experts_implementation",
    )


def experts_in_use(model: Any) -> str | None:
    """Return the implementation of a model's experts; None where it can't be chosen."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module._can_set_experts_implementation():
            return str(module.config._experts_implementation)
    return None


def has_fused_experts(model: Any) -> bool:
    """Return whether the weights of several experts are in one tensor."""
    return any(_is_fused_experts(name, weight) for name, weight in model.named_parameters())


def _is_fused_experts(name: str, weight: Any) -> bool:
    return weight.ndim > 2 and "expert" in name.lower()


@contextmanager
def quantized_experts(config: Config, quantization: Any) -> Iterator[None]:
    """Quantize the fused weights of experts while a model is loaded in the block, one at a time.

    Each is dequantized to the run's precision when its layer is called.
    Source: axolotl 0.19.0, monkeypatch/moe_quant.py, patch_moe_quantization_on_load (2026-11-27).

    Args:
        config: the validated run; without quantize_moe_experts, nothing is changed.
        quantization: the BitsAndBytesConfig of the run.
    """
    if not config.quantize_moe_experts:
        yield
        return
    from transformers import core_model_loading, modeling_utils

    set_weight, reserve = (
        core_model_loading.set_param_for_module,
        modeling_utils.caching_allocator_warmup,
    )

    def set_quantized(model: Any, name: str, value: Any, *others: Any, **options: Any) -> None:
        set_weight(model, name, value, *others, **options)
        path, _, leaf = name.rpartition(".")
        if not _is_fused_experts(name, value):
            return
        module = model.get_submodule(path)
        if not hasattr(module, "attnimg_weights"):
            # Their order, which the names of an adapter's weights depend on.
            module.attnimg_weights = tuple(module._parameters)
        _quantize_weight(module, leaf, quantization)
        # The loader keeps the tensor; its memory is needed for the next one.
        value.data = value.data.new_empty(0)

    core_model_loading.set_param_for_module = set_quantized
    # It would allocate the memory that the weights take without quantization.
    modeling_utils.caching_allocator_warmup = lambda *_, **__: None
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = set_weight
        modeling_utils.caching_allocator_warmup = reserve


def _quantize_weight(module: torch.nn.Module, name: str, quantization: Any) -> None:
    """Replace a weight by a quantized one that is dequantized when it is read."""
    if not quantization.load_in_8bit:
        from bitsandbytes.nn.parametrize import replace_parameter_4bit

        replace_parameter_4bit(
            module,
            name,
            compress_statistics=quantization.bnb_4bit_use_double_quant,
            quant_type=quantization.bnb_4bit_quant_type,
        )
        return
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant
    from torch.nn.utils.parametrize import register_parametrization

    whole = getattr(module, name).data
    rows = whole.reshape(-1, whole.shape[-1])
    numbers, scales, _ = int8_vectorwise_quant(rows.to(torch.float16))
    packed = torch.nn.Parameter(numbers.reshape(whole.shape), requires_grad=False)
    setattr(module, name, packed)
    register_parametrization(module, name, _int8_rows(scales, whole.dtype), unsafe=True)


def _int8_rows(scales: torch.Tensor, dtype: torch.dtype) -> torch.nn.Module:
    """Return the module that dequantizes a weight: int8 rows, and the largest value of each row."""
    import torch
    from bitsandbytes.functional import int8_vectorwise_dequant

    class Int8Rows(torch.nn.Module):  # type: ignore[misc]  # torch's types are not followed
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scales", scales)

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                rows = numbers.reshape(-1, numbers.shape[-1])
                whole = int8_vectorwise_dequant(rows, self.scales)
                return whole.reshape(numbers.shape).to(dtype)

    return Int8Rows()

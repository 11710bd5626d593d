"""Add adapters to experts whose fused weights are quantized.

Reading a quantized weight runs a parametrization, which PEFT 0.21.2 handles wrongly in four ways.
It finds the weight only by its full name. It nests the adapters of one module in another order than
without quantization, so the saved adapter does not fit the unquantized model. Of several adapters
it trains only the last, since the others read a cached weight without them. It does not remove the
adapters after a call, so the next call adds them once more.
Source: peft 0.21.2, tuners/tuners_utils.py, _inject_parameters, and tuners/lora/layer.py,
ParamWrapper; axolotl 0.19.0, monkeypatch/moe_quant.py, patch_peft_target_parameters_matching
(2026-11-27).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

# PEFT compares targets with the names of modules, and a parametrization is one.
_PARAMETRIZATIONS = r".*\.parametrizations\..*"
_ORIGINAL = re.compile(r"\.parametrizations\.(\w+)\.original$")


def named_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the weights of a model; quantized ones have their names without quantization."""
    for name, weight in model.named_parameters():
        yield _ORIGINAL.sub(r".\1", name), weight


def is_parametrized(name: str) -> bool:
    """Return whether a weight or module belongs to a parametrization, by its name."""
    return ".parametrizations." in name


@contextmanager
def adapting_quantized(lora: Any) -> Iterator[None]:
    """Let PEFT find quantized weights, in the same order as unquantized ones, inside the block.

    Args:
        lora: the LoraConfig of the adapter.
    """
    from peft.tuners.tuners_utils import BaseTuner

    inject = BaseTuner._inject_parameters

    def inject_quantized(
        tuner: Any, peft_config: Any, model: Any, adapter_name: str, **options: Any
    ) -> list[str]:
        quantized = list(_quantized_weights(model))
        targets = peft_config.target_parameters
        # PEFT itself finds those that the config names in full.
        others = copy.copy(peft_config)
        others.target_parameters = set(targets) - {f"{path}.{leaf}" for path, leaf in quantized}
        found: list[str] = inject(
            tuner, peft_config=others, model=model, adapter_name=adapter_name, **options
        )
        for path, leaf in quantized:
            name = f"{path}.{leaf}"
            if not any(name == entry or name.endswith(f".{entry}") for entry in targets):
                continue
            parent, _, child = path.rpartition(".")
            holder = model.get_submodule(parent)
            tuner._create_and_replace(
                peft_config, adapter_name, getattr(holder, child), child, holder,
                current_key=name, parameter_name=leaf,
            )  # fmt: skip
            wrapper = getattr(holder, child)
            wrapper._activate_lora = MethodType(_activate_uncached, wrapper)
            wrapper._remove_parametrizations = MethodType(_remove_last, wrapper)
            found.append(name)
        return found

    excluded = lora.exclude_modules
    lora.exclude_modules = "|".join(filter(None, (excluded, _PARAMETRIZATIONS)))
    BaseTuner._inject_parameters = inject_quantized
    try:
        yield
    finally:
        lora.exclude_modules = excluded
        BaseTuner._inject_parameters = inject


def _quantized_weights(model: Any) -> Iterator[tuple[str, str]]:
    """Yield the module and name of each quantized weight, in the order of unquantized ones."""
    for path, module in list(model.named_modules()):
        for leaf in getattr(module, "attnimg_weights", ()):
            if leaf in module.parametrizations:
                yield path, leaf


@contextmanager
def _activate_uncached(wrapper: Any, adapters: list[str]) -> Iterator[None]:
    """Activate an adapter, and read its weight again, since the cached one may lack it."""
    from torch.nn.utils import parametrize

    key = (id(wrapper.get_base_layer()), wrapper.parameter_name)
    with type(wrapper)._activate_lora(wrapper, adapters):
        parametrize._cache.pop(key, None)
        try:
            yield
        finally:
            parametrize._cache.pop(key, None)


def _remove_last(wrapper: Any) -> None:
    """Remove the adapter from a weight's parametrizations, if it is the last of them."""
    del wrapper.get_base_layer().parametrizations[wrapper.parameter_name][-1]

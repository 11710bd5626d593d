"""Put adapters on experts whose fused weights are quantized.

Where a weight is quantized, reading it runs a parametrization, with which PEFT 0.21.2 has four
faults: it finds the weight only by its full name; it nests the adapters of one module in another
order than without quantization, so that the saved adapter does not fit the plain model; of several
adapters it trains only the last, as the others read a cached weight without them; and it leaves
them in place after each call, so that the next call adds them once more.
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
    """Yield the weights of a model, quantized ones by the names that they have without it."""
    for name, weight in model.named_parameters():
        yield _ORIGINAL.sub(r".\1", name), weight


def is_parametrized(name: str) -> bool:
    """Return whether a name of a weight or module is that of a parametrization."""
    return ".parametrizations." in name


@contextmanager
def adapting_quantized(lora: Any) -> Iterator[None]:
    """Let PEFT find quantized weights, in the order of plain ones, while it adds an adapter.

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
        # PEFT itself adapts those that are named in full.
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
    """Yield the module and the name in it of each quantized weight, in the order of plain ones."""
    for path, module in list(model.named_modules()):
        for leaf in getattr(module, "attnimg_weights", ()):
            if leaf in module.parametrizations:
                yield path, leaf


@contextmanager
def _activate_uncached(wrapper: Any, adapters: list[str]) -> Iterator[None]:
    """Activate an adapter, and read its weight again, which may be cached without it."""
    from torch.nn.utils import parametrize

    key = (id(wrapper.get_base_layer()), wrapper.parameter_name)
    with type(wrapper)._activate_lora(wrapper, adapters):
        parametrize._cache.pop(key, None)
        try:
            yield
        finally:
            parametrize._cache.pop(key, None)


def _remove_last(wrapper: Any) -> None:
    """Remove the adapter from the parametrizations of a weight, where it is the last one."""
    del wrapper.get_base_layer().parametrizations[wrapper.parameter_name][-1]

"""Merge an adapter into the weights of a model in memory, and write them shard by shard."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from attnimg.facts import DType
from attnimg.train.model_files import WEIGHT_INDEX


@dataclass(frozen=True, slots=True)
class MergedWeights:
    """A model with a merged adapter; quantized weights are merged when they are read.

    Attributes:
        model: the model; its quantized layers are replaced by empty ones.
        quantized: name of a weight in such a layer -> the function that computes the merged one.
        dtypes: name of a weight -> its dtype in the base model.
        dtype: dtype of the other merged weights.
    """

    model: Any
    quantized: dict[str, Callable[[], torch.Tensor]]
    dtypes: dict[str, torch.dtype]
    dtype: torch.dtype

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the merged weights under the names of the model's files, one layer at a time."""
        state, seen = self.model.state_dict(), set[int]()
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        ignored = set(self.model._keys_to_ignore_on_save or ())
        names = sorted(state.keys() - ignored, key=lambda name: (name in tied, _layer_of(name)))
        for _, group in groupby(names, key=_layer_of):
            found = {}
            for name in group:
                tensor = self.quantized.pop(name)() if name in self.quantized else state[name]
                if name in tied and tensor.data_ptr() in seen:
                    continue
                seen.add(tensor.data_ptr())
                if tensor.is_floating_point():
                    tensor = tensor.to(self.dtypes.get(name, self.dtype))
                found[name] = tensor.cpu().contiguous()
            yield from revert_weight_conversion(self.model, found).items()


def _layer_of(name: str) -> str:
    """Return the part of a weight's name up to the number of its layer, or the whole name."""
    layer = re.match(r"(.*?\.\d+)\.", name)
    return layer[1] if layer else name


def why_not_mergeable(adapted: Any) -> str | None:
    """Return why an adapter can't be merged into the weights of its base model; None if it can."""
    base = adapted.get_base_model()
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if (
            any(module.lora_bias.values())
            and getattr(module.get_base_layer(), "bias", None) is None
        ):
            return f"its lora_bias trained a bias of {name}, which has none in the base model"
    both = base.get_input_embeddings(), base.get_output_embeddings()
    weights = [
        (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).weight
        for module in both
        if module is not None
    ]
    adapts = any(isinstance(module, LoraLayer) for module in both)
    if adapts and len(weights) == 2 and weights[0] is weights[1]:
        return "it adapts embed_tokens or lm_head, whose weights are tied: one of both would change"
    return None


def merge_weights(adapted: Any, *, dtype: DType) -> MergedWeights:
    """Merge an adapter in place where the weights are not quantized, and remove its layers.

    PEFT itself would quantize the merged weights again.
    Source: peft 0.21.2, tuners/lora/bnb.py, Linear4bit.merge (2026-11-27).
    """
    base, wanted = adapted.get_base_model(), getattr(torch, dtype)
    dtypes = {
        name.replace(".base_layer", "").replace(".original_module", ""): weight.dtype
        for name, weight in base.named_parameters()
        if weight.dtype == torch.float32 and ".lora_" not in name
        and ".modules_to_save." not in name
    }  # fmt: skip
    if _loaded_dtype(base) == torch.float32:
        dtypes = {}
    quantized: dict[str, Callable[[], torch.Tensor]] = {}

    def merged_weight(module: Any, layer: Any) -> torch.Tensor:
        weight = dequantize_module_weight(layer).detach()
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        if isinstance(module, BaseTunerLayer):
            module.base_layer = plain
            # The class for quantized layers has the same attributes, and would quantize again.
            Linear.merge(cast("Linear", module))
        found: torch.Tensor = plain.weight.data
        # bitsandbytes stores the transposed weight of GPT-2's layers.
        return found.T if getattr(layer, "source_cls", None) is Conv1D else found

    for name, module in list(base.named_modules()):
        if any(name.startswith(f"{done.removesuffix('.weight')}.") for done in quantized):
            continue
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not _is_quantized(layer):
            continue
        empty = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        empty.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(base.get_submodule(parent), leaf, empty)
        quantized[f"{name}.weight"] = partial(merged_weight, module, layer)
    return MergedWeights(adapted.merge_and_unload(), quantized, dtypes, wanted)


def _loaded_dtype(model: Any) -> Any:
    """Return the dtype of most weights that are not quantized."""
    sizes: dict[Any, int] = {}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and ".lora_" not in name:
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _is_quantized(layer: Any) -> bool:
    """Return whether PEFT can dequantize a layer's weight."""
    weight = getattr(layer, "weight", None)
    return (
        hasattr(layer, "W_q")
        or type(weight).__module__.startswith("torchao.")
        or type(weight).__name__ in ("Params4bit", "Int8Params")
    )


class Shards:
    """Write tensors to files of at most a given size.

    Args:
        folder: the folder of the files.
        limit: bytes in a file; a larger tensor has a file of its own.

    Attributes:
        written: bytes of all tensors so far.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.written = folder, limit, 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._size = 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor; first write a file if it would exceed the limit."""
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._size + size > self.limit:
            self._write()
        self._tensors[name] = tensor
        self._size += size
        self.written += size

    def _write(self) -> None:
        file = self.folder / f"shard-{len(self._names)}.safetensors"
        save_file(self._tensors, file, metadata={"format": "pt"})
        self._names.append(list(self._tensors))
        self._tensors, self._size = {}, 0

    def finish(self) -> None:
        """Write the last file and the index; name the files as transformers does."""
        self._write()
        count = len(self._names)
        if count == 1:
            (self.folder / "shard-0.safetensors").rename(self.folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._names):
            final = f"model-{number + 1:05}-of-{count:05}.safetensors"
            (self.folder / f"shard-{number}.safetensors").rename(self.folder / final)
            places |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.written}, "weight_map": places}
        (self.folder / WEIGHT_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

"""Load quantized weights: quantize them, dequantize a checkpoint, keep it quantized, or refuse it.

A checkpoint is judged by config.json and the headers of its files, before any weight is loaded: in
some cases transformers would load the quantized numbers as if they were weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packaging.requirements import Requirement

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import DType, Finding
from attnimg.selection.model_config import LANGUAGE_PARTS
from attnimg.selection.model_types import (
    Quantization,
    bits_of,
    method_of,
    quantization_of,
    quantizations,
)
from attnimg.train.model_files import TORCH_NAMES, StoredTensor, stored_tensors

if TYPE_CHECKING:
    import torch

_UNQUANTIZED = "set base_model to the checkpoint that it was quantized from"

# Suffixes of names that only occur in quantized checkpoints: gptq and awq, compressed-tensors,
# mxfp4, bitsandbytes. float8 is recognized by its dtype.
_PACKED = (
    ".qweight", ".weight_packed", "_blocks", ".SCB", ".absmax", ".weight_scale", "_scale_inv",
)  # fmt: skip

_INTEGERS = frozenset({"U8", "I8", "I32"})

# Dtypes in a checkpoint that is not quantized: of weights, and of buffers of positions and masks.
_WHOLE = frozenset({*TORCH_NAMES, "I64", "BOOL"})

_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})

# Names of the scale of a weight in fp8 checkpoints.
# Source: transformers 5.22.2, quantizer_finegrained_fp8.py, update_weight_conversions (2026-11-27).
_SCALES = ("{name}_scale_inv", "{module}.scale", "{module}.qscale_weight")


def judge_quantization(
    config: Config, raw: Mapping[str, Any], *, packages: Mapping[str, str] | None
) -> Finding | None:
    """Check that a run can use a checkpoint's quantization_config.

    Args:
        config: the validated run.
        raw: the model's config.json.
        packages: the installed distributions; None assumes that all are.

    Returns:
        A warning where the weights are dequantized, which takes more memory than the files; None
        otherwise.

    Raises:
        AttnimgError: code quantized-checkpoint: the run can't use it.
    """
    stored = quantization_of(raw)
    if stored is None:
        return None
    method = method_of(stored)
    row = quantizations().get(method)
    if row is None or row.loaded == "refused":
        why = row.why if row else f"it is none of {', '.join(quantizations())}"
        raise _refusal(config, method, why=f"found quant_method {method}: {why}", do=_UNQUANTIZED)
    _require_packages(config, method, row, packages)
    if row.loaded == "kept":
        _require_adapter(config, method, row, stored)
        return None
    flags = [key for key in ("load_in_8bit", "load_in_4bit") if getattr(config, key)]
    if flags or config.adapter == "qlora":
        found = f"{flags[0]}: true" if flags else "adapter: qlora"
        raise _refusal(
            config,
            method,
            why=f"found {found}, and weights that are quantized already are not quantized again\n"
            f"needed LoRA on its weights, which are dequantized from {method} while loading",
            do=f"remove {flags[0]} and set adapter: lora" if flags else "set adapter: lora",
            key=flags[0] if flags else "adapter",
        )
    return Finding(
        code="dequantized",
        key="base_model",
        what=f"{config.base_model} is quantized ({method}): its weights are dequantized while they "
        "are loaded, and the saved model is not quantized",
        do="plan for 2 bytes of memory per weight, or 4 in float32"
        + ("" if config.adapter else "; adapter: lora trains fewer weights"),
    )


def _require_packages(
    config: Config, method: str, row: Quantization, packages: Mapping[str, str] | None
) -> None:
    if packages is None:
        return
    for text in row.packages:
        needed = Requirement(text)
        found = packages.get(needed.name)
        if found is not None and needed.specifier.contains(found, prereleases=True):
            continue
        raise _refusal(
            config,
            method,
            why=f"found {f'{needed.name} {found}' if found else f'no {needed.name}'}; "
            f"needed {text}, with which transformers loads {method} weights",
            do=f"pip install '{text}', or {_UNQUANTIZED}",
        )


def _require_adapter(
    config: Config, method: str, row: Quantization, found: Mapping[str, Any]
) -> None:
    """Raise for full fine-tuning of weights that stay quantized, and for keys of other bits."""
    bits = row.bits if method.startswith("bitsandbytes") else bits_of(found)
    if row.bits is not None and bits != row.bits:
        raise _refusal(
            config,
            method,
            why=f"found weights of {bits or 'an unknown number of'} bits; "
            f"only {method} weights of {row.bits} bits can be trained",
            do=_UNQUANTIZED,
        )
    fitting = "qlora" if bits == 4 else "lora"
    if not config.adapter:
        raise _refusal(
            config,
            method,
            why="quantized weights are frozen, so an adapter is needed; found none",
            do=f"set adapter: {fitting}, or {_UNQUANTIZED}",
            key="adapter",
        )
    asked = {"load_in_8bit": config.load_in_8bit, "load_in_4bit": config.load_in_4bit}
    for key in (key for key, value in asked.items() if value):
        if method != f"bitsandbytes_{key[8:]}":
            raise _refusal(
                config,
                method,
                why=f"found {key}: true; the checkpoint's weights are quantized already",
                do=f"remove {key} and set adapter: {fitting}",
                key=key,
            )
    if config.adapter == "qlora" and fitting == "lora":
        raise _refusal(
            config,
            method,
            why="found adapter: qlora, which needs 4-bit weights of bitsandbytes",
            do="set adapter: lora",
            key="adapter",
        )


def require_known_weights(config: Config, folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise for quantized numbers that would be loaded as if they were weights.

    Args:
        config: the validated run.
        folder: the checkpoint; one without weights passes.
        raw: its config.json.

    Raises:
        AttnimgError: code quantized-checkpoint.
    """
    stored = stored_tensors(folder)
    found = quantization_of(raw)
    if found is None:
        odd = [name for name, tensor in stored.items() if _looks_quantized(name, tensor)]
        if odd:
            raise _refusal(
                config,
                "no quantization_config",
                why=f"found {odd[0]} ({stored[odd[0]].dtype})"
                + (f" and {len(odd) - 1} more" if len(odd) > 1 else "")
                + "; config.json has no quantization_config, which says how to read them",
                do="put the checkpoint's own quantization_config into its config.json, or "
                f"{_UNQUANTIZED}",
            )
        return
    if stored and all(tensor.dtype in _WHOLE for tensor in stored.values()):
        raise _refusal(
            config,
            method_of(found),
            why="found a quantization_config in config.json, and only whole weights in its files: "
            f"{', '.join(sorted({tensor.dtype for tensor in stored.values()}))}",
            do="remove quantization_config from its config.json",
        )
    if method_of(found) != "fp8":
        return
    for name, tensor in stored.items():
        if tensor.dtype not in _FLOAT8 or name.endswith(("_scale", "_scale_inv")):
            continue
        _require_scale(config, name, tensor, stored)


def _require_scale(
    config: Config, name: str, tensor: StoredTensor, stored: Mapping[str, StoredTensor]
) -> None:
    """Raise for a float8 weight whose scale is missing, or does not divide it into blocks."""
    module = name.rpartition(".")[0]
    names = [pattern.format(name=name, module=module) for pattern in _SCALES]
    scale = next((stored[key] for key in names if key in stored), None)
    if scale is None and f"{name}_scale" in stored:
        raise _refusal(
            config,
            "fp8",
            why=f"found {name} in {tensor.dtype} with {name}_scale; transformers reads the scales "
            f"of fp8 checkpoints from {names[0]} only",
            do=_UNQUANTIZED,
        )
    if scale is None:
        raise _refusal(
            config,
            "fp8",
            why=f"found {name} in {tensor.dtype} without {names[0]}; its values need that scale",
            do=f"download the checkpoint again, whole, or {_UNQUANTIZED}",
        )
    blocks = scale.shape[-2:] if len(scale.shape) > 1 else (1, 1)
    if any(size % count for size, count in zip(tensor.shape[-2:], blocks, strict=False)):
        raise _refusal(
            config,
            "fp8",
            why=f"found {name} of {tensor.shape[-2:]} with {blocks} scales; transformers "
            "dequantizes a weight only if its sizes are multiples of the number of scales",
            do=_UNQUANTIZED,
        )


def _looks_quantized(name: str, tensor: StoredTensor) -> bool:
    if tensor.dtype.startswith(("F8", "F4", "F6")) or name.endswith(_PACKED):
        return True
    return tensor.dtype in _INTEGERS and name.endswith(".weight")


def _refusal(
    config: Config, method: str, *, why: str, do: str, key: str = "base_model"
) -> AttnimgError:
    return AttnimgError(
        f"{config.base_model} is quantized ({method}), and this run cannot use it that way",
        why=why,
        do=do,
        code="quantized-checkpoint",
        key=key,
    )


def quantization(config: Config, *, dtype: DType) -> Any:
    """Return the bitsandbytes config of a run; None where weights are loaded as they are.

    Args:
        config: the validated run; adapter: qlora implies 4 bit.
        dtype: the precision that 4-bit weights are multiplied in.
    """
    from transformers import BitsAndBytesConfig

    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.load_in_4bit or config.adapter == "qlora":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP shards tensors of one dtype only, so packed weights have the dtype of the others.
            bnb_4bit_quant_storage=dtype if config.fsdp else "uint8",
        )
    return None


def use_stored_quantization(
    model_config: Any, *, dtype: DType
) -> Literal["dequantized", "kept", "refused"] | None:
    """Make transformers load a checkpoint by its own quantization_config.

    A quantization_config passed to from_pretrained would replace its list of layers that are not
    quantized.

    Args:
        model_config: the transformers configuration to load with; changed in place.
        dtype: the run's precision.

    Returns:
        `loaded` of its row in attnimg/data/quantizations.toml; None if it is not quantized.
    """
    found = quantization_of(model_config.to_dict())
    # transformers removes it from the saved config only where it stands at the top level; it raises
    # on an empty one.
    for part in (model_config, *(getattr(model_config, name, None) for name in LANGUAGE_PARTS)):
        for key in ("quantization_config", "compression_config"):
            if getattr(part, key, None) is not None:
                delattr(part, key)
    if found is None:
        return None
    method = method_of(found)
    loaded = quantizations()[method].loaded
    changes: dict[str, Any] = {"dequantize": True} if loaded == "dequantized" else {}
    if method == "bitsandbytes_4bit":
        changes["bnb_4bit_compute_dtype"] = dtype
    model_config.quantization_config = {**found, **changes}
    return loaded


def save_dequantized(model: Any) -> None:
    """Make a dequantized model save its weights as they are.

    transformers saves with the reverse of the conversion at loading, which rounds the weights to
    float8 again. As config.json has no quantization_config, they would be loaded without scales.
    Source: transformers 5.22.2, core_model_loading.py, revert_weight_conversion;
    finegrained_fp8.py, Fp8Dequantize.reverse_op (2026-11-27).

    Args:
        model: the loaded model; it then saves weights under the names of its class.
    """
    if hasattr(model, "_weight_conversions"):
        del model._weight_conversions


def cast_unquantized(model: Any, dtype: torch.dtype) -> None:
    """Cast the weights that are not quantized in a quantized checkpoint to the requested dtype.

    Args:
        model: the loaded model; weights that its class keeps in float32 are not cast.
        dtype: the requested dtype.
    """
    import torch

    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    patterns = [re.escape(name).replace(r"\*", r"\d+") for name in kept]
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or weight.element_size() == 1:
            continue
        if not any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns):
            weight.data = weight.data.to(dtype)

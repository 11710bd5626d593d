"""Put a LoRA adapter on a model, and load its weights quantized where the config says so."""

from __future__ import annotations

import re
import warnings
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import DType
from attnimg.train.lora_advice import advice_on, find_fitting
from attnimg.train.lora_targets import (
    embeddings,
    is_named,
    require_modules_to_save,
    resolve_targets,
)
from attnimg.train.precision import torch_dtype
from attnimg.train.towers import freeze_towers


def _bad(key: str, what: str, *, why: str, do: str) -> AttnimgError:
    return AttnimgError(what, why=why, do=do, code="bad-value", key=key)


def quantization(config: Config, *, dtype: DType) -> Any:
    """Make the bitsandbytes config of the run; None when weights are loaded as they are.

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
            bnb_4bit_compute_dtype=torch_dtype(dtype),
            # FSDP shards tensors of one dtype only, so the packed weights take the others'.
            bnb_4bit_quant_storage=torch_dtype(dtype) if config.fsdp else "uint8",
        )
    return None


def add_adapter(model: Any, config: Config) -> Any:
    """Wrap `model` in a PEFT model with the config's LoRA; its other weights are frozen.

    Raises:
        AttnimgError: a module that the config names does not exist in the model, or can't be
            adapted (bad-value).
    """
    from peft import LoraConfig, get_peft_model

    frozen = freeze_towers(model)
    targets = resolve_targets(model, config)
    require_modules_to_save(model, config)
    names, tied = embeddings(model)
    saved = config.lora_modules_to_save or []
    lora = LoraConfig(
        # Without a task, PEFT writes the model's class into adapter_config.json.
        task_type=None if frozen else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_within(frozen),
        # A copy, since PEFT adds tied modules to the list.
        modules_to_save=list(saved) or None,
        fan_in_fan_out=bool(config.lora_fan_in_fan_out),
        use_dora=bool(config.peft_use_dora),
        use_rslora=bool(config.peft_use_rslora),
        # Tied embeddings stay tied: otherwise training would make them differ.
        ensure_weight_tying=tied and any(is_named(name, saved) for name in names),
    )
    fitting = find_fitting(model, config)
    try:
        with warnings.catch_warnings():
            # PEFT warns where no target is in an excluded module, which is no fault.
            warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            # PEFT has applied them: it looks for the experts' parameters among the modules.
            warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys")
            return get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise _bad(
            "lora_target_modules",
            "the adapter does not fit the model",
            why=_short(error),
            do=advice_on(fitting, config, error),
        ) from error


def _short(error: Exception) -> str:
    """Return PEFT's message in one line, without the printed module."""
    found = re.match(r"Target module (\w+)\(.* is not supported", str(error), re.DOTALL)
    if found is None:
        return str(error).splitlines()[0]
    return f"found a target of the class {found[1]}; needed a linear layer, an embedding or experts"


def adapter_notes(model: Any, config: Config) -> list[str]:
    """Return notes for the user on the adapter of a model."""
    lora = getattr(model, "peft_config", {}).get("default")
    if lora is None:
        return []
    notes = []
    if lora.ensure_weight_tying:
        names, _ = embeddings(model.get_base_model())
        leaves = " and ".join(name.rpartition(".")[2] for name in names)
        notes.append(
            f"lora_modules_to_save: {leaves} are tied in the base model: both are trained, and "
            "stay one weight"
        )
    bare = sorted(_bare_experts(model))
    if bare and _asks_for_experts(config):
        notes.append(
            f"the experts' weights ({', '.join(bare)}) get no adapter and are not trained: PEFT "
            f"does not support them in a {model.config.model_type} model"
        )
    return notes


def _bare_experts(model: Any) -> set[str]:
    """Return the last part of the names of experts' frozen parameters without an adapter."""
    return {
        name.rpartition(".")[2]
        for name, weight in model.named_parameters()
        if weight.dim() > 2 and ".experts." in name and ".base_layer." not in name
        and not weight.requires_grad
    }  # fmt: skip


def _asks_for_experts(config: Config) -> bool:
    """Return whether the targets name the layers of a feed-forward block, or all layers."""
    targets = config.lora_target_modules
    if not targets or config.lora_target_linear:
        return True
    text = targets if isinstance(targets, str) else " ".join(targets)
    return (
        re.search(r"(?i)all-linear|(gate|up|down)(_up)?_proj|\bw[123]\b|experts", text) is not None
    )


def _within(modules: tuple[str, ...]) -> str | None:
    """Return a regular expression for the submodules of modules; None for no modules."""
    return rf"({'|'.join(re.escape(name) for name in modules)})\..*" if modules else None

"""Train the language model of a checkpoint that also sees or hears, and keep its other parts.

Such a checkpoint is loaded by its own class, not by the one of its language model: what is saved
has all its weights, and loads as before. Training on text moves the language model alone, so the
vision and audio parts, and what connects them, are frozen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnimg.facts import Finding
from attnimg.model_classes import read_causal_types
from attnimg.schema import Config
from attnimg.train.causal import DEFAULT

# The parts of config.json that describe what is no language model.
OTHER_PARTS = ("vision_config", "audio_config", "vq_config", "speech_config")
# What an AutoProcessor reads beside the tokenizer.
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def class_to_load(config: Config, raw: Mapping[str, Any]) -> str:
    """Name the class of transformers that loads a checkpoint.

    Args:
        config: the validated run; its model_type is the user's choice.
        raw: the model's config.json.

    Returns:
        The class that config.json names where AutoModelForCausalLM would drop what is not the
        language model, or not load it at all.
    """
    # Asked for by name, it loads the language model alone where it loads anything.
    loads_all = raw.get("model_type") in read_causal_types().text_trained
    if config.model_type and not (config.model_type == DEFAULT and loads_all):
        return config.model_type
    return _multimodal_class(raw) or DEFAULT


def judge_towers(config: Config, raw: Mapping[str, Any]) -> Finding | None:
    """Return a warning where parts of a checkpoint are frozen, or dropped at the user's will."""
    parts = [name for name in OTHER_PARTS if isinstance(raw.get(name), Mapping)]
    if not parts or (config.trust_remote_code and "auto_map" in raw):
        return None
    named = ", ".join(name.removesuffix("_config") for name in parts)
    whole = _multimodal_class(raw)
    divisible = raw.get("model_type") in read_causal_types().multimodal
    if divisible and whole is None:
        return None
    if divisible and config.model_type == DEFAULT:
        return Finding(
            code="loses-towers",
            key="model_type",
            what=f"{config.base_model} has parts beside its language model ({named}), which "
            f"{DEFAULT} drops: what is saved is its language model alone",
            do=f"remove model_type: {whole} keeps them",
        )
    return Finding(
        code="towers-frozen",
        key="base_model",
        what=f"{config.base_model} has parts beside its language model ({named}): they are frozen, "
        "and saved as they are",
        do=f"set model_type: {DEFAULT} if its language model alone should be saved"
        if divisible
        else "count on their memory, too: they are loaded with the language model",
    )


def _multimodal_class(raw: Mapping[str, Any]) -> str | None:
    """Return the class of a checkpoint of which AutoModelForCausalLM loads a part or nothing."""
    types = read_causal_types()
    type_ = str(raw.get("model_type"))
    if type_ in types.text_trained:
        return types.with_other_inputs[type_]
    # One that names its language model's class has no other weights.
    if types.causal.get(type_) in (raw.get("architectures") or ()):
        return None
    return types.multimodal.get(type_)


def attention_by_part(model_config: Any, implementation: str) -> str | dict[str, str]:
    """Return what from_pretrained takes to run an attention in the language model alone.

    The other parts keep what transformers chooses for them: the attention was neither judged nor
    proven for their layers, and their classes may not take it.

    Args:
        model_config: a transformers configuration.
        implementation: transformers' name of an attention.
    """
    text = model_config.get_text_config(decoder=True)
    named = [name for name in model_config.sub_configs if getattr(model_config, name, None) is text]
    if text is model_config or not named:
        return implementation
    return {"": implementation, **dict.fromkeys(named, implementation)}


def freeze_towers(model: Any) -> tuple[str, ...]:
    """Freeze what is not the language model of a loaded model.

    Args:
        model: a transformers model.

    Returns:
        The names of the frozen modules; empty for a plain language model.
    """
    if model.config.get_text_config(decoder=True) is model.config:
        return ()
    trained = {id(weight) for part in _language_parts(model) for weight in part.parameters()}
    frozen: list[str] = []
    for name, module in model.named_modules():
        weights = list(module.parameters())
        if not weights or any(id(weight) in trained for weight in weights):
            continue
        if not any(name.startswith(f"{outer}.") for outer in frozen):
            frozen.append(name)
    for weight in model.parameters():
        if id(weight) not in trained:
            weight.requires_grad_(False)
    return tuple(frozen)


def _language_parts(model: Any) -> Iterable[Any]:
    """Return the decoder and the two ends of a model's language model."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if part is not None]


def keep_processor(config: Config, loaded: Mapping[str, Any], folder: Path) -> None:
    """Copy what an AutoProcessor needs from a checkpoint that is no plain language model.

    Args:
        config: the validated run.
        loaded: the model's config before training, as `to_dict` gives it.
        folder: where the trained model lies.
    """
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES if any(loaded.get(part) for part in OTHER_PARTS) else ():
        found = cached_file(
            config.base_model,
            name,
            revision=config.revision_of_model,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)

"""Train only the language model of a multimodal checkpoint; freeze its vision and audio towers.

Such a checkpoint is loaded by its own class, not by the class of its language model, so that the
saved model has all its weights. Training on text trains the language model only: the towers, and
the layers that connect them, are frozen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.facts import Finding
from attnimg.select.model_types import read_causal_types
from attnimg.train.causal import DEFAULT

# Fields of config.json that describe other parts than the language model.
OTHER_PARTS = ("vision_config", "audio_config", "vq_config", "speech_config")
# Files that an AutoProcessor reads besides the tokenizer's.
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


def class_to_load(config: Config, raw: Mapping[str, Any]) -> str:
    """Return the name of the transformers class that loads a checkpoint.

    Args:
        config: the validated run; its model_type is the user's choice.
        raw: the model's config.json.

    Returns:
        model_type where the config has it, otherwise AutoModelForCausalLM, or the multimodal class
        where AutoModelForCausalLM would load only the language model or nothing.
    """
    # AutoModelForCausalLM loads the language model of the other types where it is asked for.
    loads_all = raw.get("model_type") in read_causal_types().text_trained
    if config.model_type and not (config.model_type == DEFAULT and loads_all):
        return config.model_type
    return _multimodal_class(raw) or DEFAULT


def judge_towers(config: Config, raw: Mapping[str, Any]) -> Finding | None:
    """Return a warning where parts of a checkpoint are frozen, or dropped because of model_type."""
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
            what=f"{config.base_model} has parts besides its language model ({named}), which "
            f"{DEFAULT} drops: only the language model is saved",
            do=f"remove model_type: {whole} keeps them",
        )
    return Finding(
        code="towers-frozen",
        key="base_model",
        what=f"{config.base_model} has parts besides its language model ({named}): they are "
        "frozen, and saved unchanged",
        do=f"set model_type: {DEFAULT} to save only its language model"
        if divisible
        else "plan for their memory: they are loaded, too",
    )


def _multimodal_class(raw: Mapping[str, Any]) -> str | None:
    """Return the multimodal class of a checkpoint; None where it has a language model only."""
    types = read_causal_types()
    type_ = str(raw.get("model_type"))
    if type_ in types.text_trained:
        return types.with_other_inputs[type_]
    # A checkpoint whose architectures has the language model's class has no other weights.
    if types.causal.get(type_) in (raw.get("architectures") or ()):
        return None
    return types.multimodal.get(type_)


def attention_by_part(model_config: Any, implementation: str) -> str | dict[str, str]:
    """Return the attn_implementation that sets only the attention of the language model.

    The other parts keep the default of transformers: the backend was neither judged nor proven for
    their layers, and their classes may not support it.

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
    """Freeze all weights of a loaded model outside its language model.

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
    """Return the decoder and the input and output embeddings of a language model."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return [part for part in parts if part is not None]


def keep_processor(config: Config, loaded: Mapping[str, Any], folder: Path) -> None:
    """Copy the files of the AutoProcessor of a multimodal checkpoint.

    Args:
        config: the validated run.
        loaded: the model's config before training, as `to_dict` gives it.
        folder: of the trained model.
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

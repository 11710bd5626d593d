"""Refuse models that are not causal language models, before their weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.select.model_types import read_causal_types, refusal_of

# What chooses a class by the model's type; the last two also load models that take images.
DEFAULT = "AutoModelForCausalLM"
AUTO_CLASSES = frozenset({DEFAULT, "AutoModelForImageTextToText", "AutoModelForMultimodalLM"})


def require_causal_type(config: Config, raw: Mapping[str, Any]) -> None:
    """Raise unless config.json describes a causal language model.

    Args:
        config: the validated run; a class that its key model_type names is judged by
            require_causal_class instead.
        raw: the model's config.json.

    Raises:
        AttnimgError: code not-causal-lm.
    """
    type_ = raw.get("model_type")
    brings_code = DEFAULT in (raw.get("auto_map") or {})
    if (config.model_type or DEFAULT) != DEFAULT or not isinstance(type_, str):
        return
    if brings_code and config.trust_remote_code:
        return
    types = read_causal_types()
    if type_ in types.causal:
        if type_ not in types.two_sided or raw.get("is_decoder") is True:
            return
        found = "its tokens attend to later tokens, or it has an encoder"
        do = "choose a decoder; a decoder of this type has is_decoder: true in its config.json"
    elif type_ in types.text_trained:
        return
    elif type_ in types.with_other_inputs:
        found = "it takes images or audio, and training it on text only was not tested"
        do = (
            "choose a decoder such as llama, qwen3 or mistral; to try this one anyway, set "
            f"model_type: {types.with_other_inputs[type_]}"
        )
    else:
        found = "transformers has no causal language model of that type"
        do = "choose a decoder such as llama, qwen3 or mistral"
        if brings_code:
            do = "set trust_remote_code: true, since the model brings its own code"
    raise _refusal(
        f"{config.base_model} (model_type {type_})", found=found, do=do, key="base_model"
    )


def require_trainable(
    config: Config, raw: Mapping[str, Any], *, packages: Mapping[str, str] | None
) -> None:
    """Raise unless the run's model is known to train, with packed rows where the run packs.

    Args:
        config: the validated run.
        raw: the model's config.json.
        packages: the installed distributions; None assumes that all are.

    Raises:
        AttnimgError: code not-causal-lm, not-trainable, loss-differs or packing-not-isolated.
    """
    require_causal_type(config, raw)
    if DEFAULT in (raw.get("auto_map") or {}) and config.trust_remote_code:
        return
    found = refusal_of(
        raw,
        name=str(config.base_model),
        packing=bool(config.sample_packing) or config.batch_flattening is True,
        sequence_len=config.sequence_len,
        packages=packages,
    )
    if found is not None:
        raise AttnimgError(found.what, why=found.why, do=found.do, code=found.code, key=found.key)


def require_causal_class(name: str) -> None:
    """Raise unless a class of transformers that model_type names is a causal language model's.

    Raises:
        AttnimgError: code not-causal-lm.
    """
    types = read_causal_types()
    known = {*types.causal.values(), *types.with_other_inputs.values(), *types.multimodal.values()}
    if name in AUTO_CLASSES or name in known:
        return
    raise _refusal(
        f"model_type: {name}",
        found="transformers lists the class under another task",
        do=f"remove model_type: {DEFAULT} finds the right class",
        key="model_type",
    )


def _refusal(what: str, *, found: str, do: str, key: str) -> AttnimgError:
    return AttnimgError(
        f"{what} is not a causal language model",
        why=f"found: {found}\nneeded: a model that predicts each token from those before it",
        do=do,
        code="not-causal-lm",
        key=key,
    )

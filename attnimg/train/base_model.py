"""Check a base model by its config.json and the headers of its weights, before they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding, Machine
from attnimg.selection.model_config import LANGUAGE_PARTS
from attnimg.selection.model_types import position_table, read_causal_types, refusal_of
from attnimg.task import model_file
from attnimg.train.model_files import OTHER_PARTS
from attnimg.train.pickled_weights import require_safetensors
from attnimg.train.quantized import judge_quantization, require_known_weights

# Classes that choose the model's class by its type; the last two also load models with image input.
DEFAULT = "AutoModelForCausalLM"

AUTO_CLASSES = frozenset({DEFAULT, "AutoModelForImageTextToText", "AutoModelForMultimodalLM"})


def judge_base_model(
    config: Config, raw: Mapping[str, Any], machine: Machine
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return every error and warning on a base model, without its attention.

    Args:
        config: the validated run.
        raw: the model's config.json.
        machine: its installed packages are used; None for packages assumes that all are installed.

    Returns:
        The errors, each of which ends the run, and the warnings.
    """
    path = model_file(config)
    return judge_files(
        config, raw, packages=machine.packages, folder=path.parent if path is not None else None
    )


def judge_files(
    config: Config,
    raw: Mapping[str, Any],
    *,
    packages: Mapping[str, str] | None,
    folder: Path | None,
) -> tuple[list[AttnimgError], list[Finding]]:
    """Return the errors and warnings of judge_base_model, from its inputs.

    Args:
        config: the validated run.
        raw: the model's config.json.
        packages: the installed distributions; None assumes that all are.
        folder: the folder of its weights; None where they are not on this machine.
    """

    def known_weights() -> None:
        if folder is not None:
            local = Path(config.base_model or "").expanduser().is_dir()
            hub = None if local else config.base_model
            require_safetensors(folder, key="base_model", hub=hub)
            require_known_weights(config, folder, raw)

    checks: tuple[Callable[[], Finding | None], ...] = (
        lambda: require_trainable(config, raw, packages=packages),
        lambda: judge_quantization(config, raw, packages=packages),
        known_weights,
        lambda: judge_positions(config, raw),
        lambda: judge_towers(config, raw),
    )
    errors, warnings = [], []
    for check in checks:
        try:
            found = check()
        except AttnimgError as error:
            errors.append(error)
        else:
            warnings += [found] if found else []
    return errors, warnings


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


def judge_positions(config: Config, raw: Mapping[str, Any]) -> Finding | None:
    """Compare sequence_len with the positions that a model has.

    Args:
        config: the validated run.
        raw: the model's config.json.

    Returns:
        A warning for rotary positions beyond those of the config; None where they suffice or are
        unknown.

    Raises:
        AttnimgError: the model's table of positions is shorter than sequence_len (code
            positions-short).
    """
    part = _language_part(raw)
    type_ = str(part.get("model_type") or raw.get("model_type"))
    table = position_table(type_)
    if table is not None:
        named = (part[key] for key in table.keys if isinstance(part.get(key), int))
        padding, reserved = part.get("pad_token_id"), table.reserved
        if reserved and isinstance(padding, int):
            reserved = padding + 1
        # No token can have a reserved position.
        found = next(named, table.default) - reserved
        if config.sequence_len <= found:
            return None
        raise AttnimgError(
            f"{config.base_model} has {found:,} positions, fewer than sequence_len",
            why=f"found {found:,} positions ({type_}, {table.keys[0]} in config.json); "
            f"needed sequence_len {config.sequence_len:,}",
            do=f"set sequence_len: {found}",
            code="positions-short",
            key="sequence_len",
        )
    reach = rope_reach(part)
    if reach is None or config.sequence_len <= reach:
        return None
    return Finding(
        code="positions-beyond",
        key="sequence_len",
        what=f"sequence_len {config.sequence_len:,} exceeds the {reach:,} positions of "
        f"{config.base_model}, which was not trained on later ones",
        do=f"set sequence_len: {reach}, or scale its RoPE by rope_parameters in its "
        "config.json, such as rope_type yarn and a factor",
    )


def rope_reach(part: Mapping[str, Any]) -> int | None:
    """Return how many positions a config's RoPE covers, including its scaling.

    Args:
        part: the part of config.json that describes the language model.

    Returns:
        max_position_embeddings, or the original length times the factor where that is more; None
        where the config has no such length, or ALiBi instead of RoPE.
    """
    longest = part.get("max_position_embeddings")
    if type(longest) is not int or part.get("alibi"):
        return None
    reach = float(longest)
    for scaling in _scalings(part):
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        factor = scaling.get("factor")
        if kind == "default" or not isinstance(factor, int | float):
            continue
        original = scaling.get("original_max_position_embeddings") or longest
        if isinstance(original, int | float):
            reach = max(reach, original * factor)
    return int(reach)


def _scalings(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE settings of a config: one for all layers, or one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = part.get(key)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))


def _language_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = (raw.get(name) for name in LANGUAGE_PARTS)
    return next((part for part in parts if isinstance(part, Mapping) and part), raw)


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
    """Return the implementation for from_pretrained that changes only the language model.

    The other parts keep the default of transformers: the backend was neither selected nor proven
    for their layers, and their classes may not support it.

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
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    trained = {id(weight) for part in parts if part is not None for weight in part.parameters()}
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

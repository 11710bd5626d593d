"""Check a base model by its config.json and the headers of its weights, before they are loaded.

In some cases transformers would load the quantized numbers of a checkpoint as if they were weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnimg.config.class_rules import DEFAULT
from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import Finding, Machine
from attnimg.selection.model_config import LANGUAGE_PARTS
from attnimg.selection.model_types import (
    Quantization,
    find_quantization,
    find_refusal,
    position_table,
    quantization_method,
    quantizations,
    read_causal_types,
    weight_bits,
)
from attnimg.task import model_file
from attnimg.train.hub_layers import judge_hub_layers
from attnimg.train.layers import judge_layers
from attnimg.train.model_files import OTHER_PARTS, TORCH_NAMES, StoredTensor, read_tensor_headers
from attnimg.train.pickled_weights import require_safetensors


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
    errors, warnings = judge_files(
        config, raw, packages=machine.packages, folder=path.parent if path is not None else None
    )
    for judge in (judge_layers, judge_hub_layers):
        more, notes = judge(config, raw, machine)
        errors, warnings = errors + more, warnings + notes
    return errors, warnings


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

    def check_weights() -> None:
        if folder is not None:
            is_local = Path(config.base_model or "").expanduser().is_dir()
            hub = None if is_local else config.base_model
            if config.reinit_weights:
                return
            require_safetensors(folder, key="base_model", hub=hub)
            require_known_weights(config, folder, raw)

    checks: tuple[Callable[[], Finding | None], ...] = (
        lambda: require_trainable(config, raw, packages=packages),
        lambda: judge_quantization(config, raw, packages=packages),
        check_weights,
        lambda: judge_positions(config, raw),
        lambda: judge_other_parts(config, raw),
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


def count_stored_weights(config: Config) -> int | None:
    """Return the number of weights in the model's files; None where they are not here or quantized.

    Args:
        config: the validated run.
    """
    path = model_file(config)
    tensors = read_tensor_headers(path.parent).values() if path is not None else ()
    if any(tensor.dtype not in TORCH_NAMES for tensor in tensors):
        return None
    return sum(math.prod(tensor.shape) for tensor in tensors) or None


def require_causal_type(config: Config, raw: Mapping[str, Any]) -> None:
    """Raise unless config.json describes a causal language model.

    Args:
        config: the validated run; a class that its key model_type names is judged by
            config/class_rules.py instead.
        raw: the model's config.json.

    Raises:
        AttnimgError: code not-causal-lm.
    """
    type_ = raw.get("model_type")
    has_own_code = DEFAULT in (raw.get("auto_map") or {})
    if (config.model_type or DEFAULT) != DEFAULT or not isinstance(type_, str):
        return
    if has_own_code and config.trust_remote_code:
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
        found = "it takes images or audio, and training it on text alone was not tested"
        do = (
            "choose a decoder such as llama, qwen3 or mistral; to try this one anyway, set "
            f"model_type: {types.with_other_inputs[type_]}"
        )
    else:
        found = "transformers has no causal language model of that type"
        do = "choose a decoder such as llama, qwen3 or mistral"
        if has_own_code:
            do = "set trust_remote_code: true, since the model has its own code"
    raise _not_causal_error(
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
    found = find_refusal(
        raw,
        name=str(config.base_model),
        packing=bool(config.sample_packing) or config.batch_flattening is True,
        sequence_len=config.sequence_len,
        packages=packages,
    )
    if found is not None:
        raise AttnimgError(found.what, why=found.why, do=found.do, code=found.code, key=found.key)


def _not_causal_error(what: str, *, found: str, do: str, key: str) -> AttnimgError:
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
        values = (part[key] for key in table.keys if isinstance(part.get(key), int))
        padding, reserved = part.get("pad_token_id"), table.reserved
        if reserved and isinstance(padding, int):
            reserved = padding + 1
        # No token can have a reserved position.
        found = next(values, table.default) - reserved
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
    positions = rope_positions(part)
    if positions is None or config.sequence_len <= positions:
        return None
    return Finding(
        code="positions-beyond",
        key="sequence_len",
        what=f"sequence_len {config.sequence_len:,} exceeds the {positions:,} positions of "
        f"{config.base_model}, which was not trained on later ones",
        do=f"set sequence_len: {positions}, or scale its RoPE by rope_parameters in its "
        "config.json, for example rope_type yarn and a factor",
    )


def rope_positions(part: Mapping[str, Any]) -> int | None:
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
    positions = float(longest)
    for scaling in _rope_settings(part):
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        factor = scaling.get("factor")
        if kind == "default" or not isinstance(factor, int | float):
            continue
        original = scaling.get("original_max_position_embeddings") or longest
        if isinstance(original, int | float):
            positions = max(positions, original * factor)
    return int(positions)


def _rope_settings(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the RoPE settings of a config: one for all layers, or one for each kind of layer."""
    for key in ("rope_parameters", "rope_scaling"):
        found = part.get(key)
        if isinstance(found, Mapping):
            yield found
            yield from (inner for inner in found.values() if isinstance(inner, Mapping))


def _language_part(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    parts = (raw.get(name) for name in LANGUAGE_PARTS)
    return next((part for part in parts if isinstance(part, Mapping) and part), raw)


def judge_other_parts(config: Config, raw: Mapping[str, Any]) -> Finding | None:
    """Return a warning if parts of a checkpoint are frozen, or dropped because of model_type."""
    parts = [name for name in OTHER_PARTS if isinstance(raw.get(name), Mapping)]
    if not parts or (config.trust_remote_code and "auto_map" in raw):
        return None
    names = ", ".join(name.removesuffix("_config") for name in parts)
    multimodal = _multimodal_class(raw)
    is_divisible = raw.get("model_type") in read_causal_types().multimodal
    if is_divisible and multimodal is None:
        return None
    if is_divisible and config.model_type == DEFAULT:
        return Finding(
            code="loses-towers",
            key="model_type",
            what=f"{config.base_model} has parts besides its language model ({names}), which "
            f"{DEFAULT} drops: only the language model is saved",
            do=f"remove model_type: {multimodal} keeps them",
        )
    return Finding(
        code="towers-frozen",
        key="base_model",
        what=f"{config.base_model} has parts besides its language model ({names}): they are "
        "frozen, and saved unchanged",
        do=f"set model_type: {DEFAULT} to save only its language model"
        if is_divisible
        else "plan for their memory: they are loaded as well",
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
    # AutoModelForCausalLM loads the language model of the other types if model_type requests it.
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


_USE_UNQUANTIZED = "set base_model to the checkpoint that it was quantized from"

# Suffixes of names that only occur in quantized checkpoints: gptq and awq, compressed-tensors,
# mxfp4, bitsandbytes. float8 is recognized by its dtype.
_PACKED = (
    ".qweight", ".weight_packed", "_blocks", ".SCB", ".absmax", ".weight_scale", "_scale_inv",
)  # fmt: skip

_INTEGERS = frozenset({"U8", "I8", "I32"})

# Dtypes in a checkpoint that is not quantized: of weights, and of buffers of positions and masks.
_UNQUANTIZED_DTYPES = frozenset({*TORCH_NAMES, "I64", "BOOL"})

_FLOAT8 = frozenset({"F8_E4M3", "F8_E5M2"})

# Names of the scale of a weight in fp8 checkpoints.
# Source: transformers 5.22.2, quantizer_finegrained_fp8.py, update_weight_conversions (2026-11-27).
_SCALES = ("{name}_scale_inv", "{module}.scale", "{module}.qscale_weight")


# The classes that model_quantization_config names -> the quantizations that they load.
_QUANTIZATION_CLASSES = {"Mxfp4Config": ("mxfp4",), "FineGrainedFP8Config": ("fp8", "mxfp8")}


def _unused_quantization(config: Config) -> Finding:
    """Return the warning for model_quantization_config on weights that are not quantized."""
    key = "model_quantization_config"
    return Finding(
        code="done-otherwise",
        key=key,
        what=f"{key} has nothing to dequantize: the weights of {config.base_model} are not "
        "quantized",
        do=f"remove {key} and {key}_kwargs",
    )


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
    stored = None if config.reinit_weights else find_quantization(raw)
    named = config.model_quantization_config
    if stored is None:
        return _unused_quantization(config) if named else None
    method = quantization_method(stored)
    if named and method not in _QUANTIZATION_CLASSES[named]:
        raise _quantization_error(
            config,
            method,
            why=f"found model_quantization_config: {named}; needed a checkpoint in "
            f"{' or '.join(_QUANTIZATION_CLASSES[named])}",
            do="remove model_quantization_config and model_quantization_config_kwargs",
            key="model_quantization_config",
        )
    row = quantizations().get(method)
    if row is None or row.loaded == "refused":
        reason = row.why if row else f"it is none of {', '.join(quantizations())}"
        why = f"found quant_method {method}: {reason}"
        raise _quantization_error(config, method, why=why, do=_USE_UNQUANTIZED)
    _require_packages(config, method, row, packages)
    if row.loaded == "kept":
        _require_adapter(config, method, row, stored)
        if config.bnb_config_kwargs:
            why = "found bnb_config_kwargs, but its weights are not quantized again"
            do, key = "remove bnb_config_kwargs", "bnb_config_kwargs"
            raise _quantization_error(config, method, why=why, do=do, key=key)
        return None
    flags = [key for key in ("load_in_8bit", "load_in_4bit") if getattr(config, key)]
    if flags or config.adapter == "qlora":
        found = f"{flags[0]}: true" if flags else "adapter: qlora"
        why = (
            f"found {found}, but weights that are quantized already are not quantized again\n"
            f"needed LoRA on its weights, which are dequantized from {method} while loading"
        )
        do = f"remove {flags[0]} and set adapter: lora" if flags else "set adapter: lora"
        key = flags[0] if flags else "adapter"
        raise _quantization_error(config, method, why=why, do=do, key=key)
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
    """Raise unless the packages that load a quantization are installed."""
    if packages is None or not row.packages:
        return
    from packaging.requirements import Requirement  # 10 ms, for quantized models only

    for text in row.packages:
        needed = Requirement(text)
        version = packages.get(needed.name)
        if version is None or not needed.specifier.contains(version, prereleases=True):
            found = f"{needed.name} {version}" if version else f"no {needed.name}"
            why = f"found {found}; needed {text}, with which transformers loads {method} weights"
            do = f"pip install '{text}', or {_USE_UNQUANTIZED}"
            raise _quantization_error(config, method, why=why, do=do)


def _require_adapter(
    config: Config, method: str, row: Quantization, stored: Mapping[str, Any]
) -> None:
    """Raise for full fine-tuning of weights that stay quantized, and for keys of other bits."""
    bits = row.bits if method.startswith("bitsandbytes") else weight_bits(stored)
    if row.bits is not None and bits != row.bits:
        why = (
            f"found weights of {bits or 'an unknown number of'} bits; "
            f"only {method} weights of {row.bits} bits can be trained"
        )
        raise _quantization_error(config, method, why=why, do=_USE_UNQUANTIZED)
    adapter = "qlora" if bits == 4 else "lora"
    if not config.adapter:
        why = "quantized weights are frozen, so an adapter is needed; found none"
        do = f"set adapter: {adapter}, or {_USE_UNQUANTIZED}"
        raise _quantization_error(config, method, why=why, do=do, key="adapter")
    for key in ("load_in_8bit", "load_in_4bit"):
        if getattr(config, key) and method != f"bitsandbytes_{key[8:]}":
            why = f"found {key}: true; the checkpoint's weights are quantized already"
            do = f"remove {key} and set adapter: {adapter}"
            raise _quantization_error(config, method, why=why, do=do, key=key)
    if config.adapter == "qlora" and adapter == "lora":
        why = "found adapter: qlora, which needs 4-bit weights of bitsandbytes"
        raise _quantization_error(config, method, why=why, do="set adapter: lora", key="adapter")


def require_known_weights(config: Config, folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise for quantized numbers that would be loaded as if they were weights.

    Args:
        config: the validated run.
        folder: the checkpoint; one without weights passes.
        raw: its config.json.

    Raises:
        AttnimgError: code quantized-checkpoint.
    """
    tensors = read_tensor_headers(folder)
    stored = find_quantization(raw)
    if stored is None:
        quantized = [name for name, tensor in tensors.items() if _looks_quantized(name, tensor)]
        if quantized:
            more = f" and {len(quantized) - 1} more" if len(quantized) > 1 else ""
            why = (
                f"found {quantized[0]} ({tensors[quantized[0]].dtype}){more}; config.json has no "
                "quantization_config, which describes how to read them"
            )
            do = (
                "put the checkpoint's own quantization_config into its config.json, or "
                f"{_USE_UNQUANTIZED}"
            )
            raise _quantization_error(config, "no quantization_config", why=why, do=do)
        return
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if tensors and dtypes <= _UNQUANTIZED_DTYPES:
        why = (
            "found a quantization_config in config.json, but only unquantized weights in its "
            f"files: {', '.join(sorted(dtypes))}"
        )
        do = "remove quantization_config from its config.json"
        raise _quantization_error(config, quantization_method(stored), why=why, do=do)
    for name, tensor in tensors.items() if quantization_method(stored) == "fp8" else ():
        if tensor.dtype in _FLOAT8 and not name.endswith(("_scale", "_scale_inv")):
            _require_scale(config, name, tensor, tensors)


def _require_scale(
    config: Config, name: str, tensor: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> None:
    """Raise for a float8 weight whose scale is missing, or does not divide it into blocks."""
    module = name.rpartition(".")[0]
    names = [pattern.format(name=name, module=module) for pattern in _SCALES]
    scale = next((tensors[key] for key in names if key in tensors), None)
    if scale is None and f"{name}_scale" in tensors:
        why = (
            f"found {name} in {tensor.dtype} with {name}_scale; transformers reads the scales "
            f"of fp8 checkpoints from {names[0]} only"
        )
        raise _quantization_error(config, "fp8", why=why, do=_USE_UNQUANTIZED)
    if scale is None:
        why = f"found {name} in {tensor.dtype} without {names[0]}; its values need that scale"
        do = f"download all files of the checkpoint again, or {_USE_UNQUANTIZED}"
        raise _quantization_error(config, "fp8", why=why, do=do)
    blocks = scale.shape[-2:] if len(scale.shape) > 1 else (1, 1)
    if any(size % count for size, count in zip(tensor.shape[-2:], blocks, strict=False)):
        why = (
            f"found {name} of {tensor.shape[-2:]} with {blocks} scales; transformers "
            "dequantizes a weight only if its sizes are multiples of the number of scales"
        )
        raise _quantization_error(config, "fp8", why=why, do=_USE_UNQUANTIZED)


def _looks_quantized(name: str, tensor: StoredTensor) -> bool:
    if tensor.dtype.startswith(("F8", "F4", "F6")) or name.endswith(_PACKED):
        return True
    return tensor.dtype in _INTEGERS and name.endswith(".weight")


def _quantization_error(
    config: Config, method: str, *, why: str, do: str, key: str = "base_model"
) -> AttnimgError:
    return AttnimgError(
        f"{config.base_model} is quantized ({method}), and this run cannot use it that way",
        why=why,
        do=do,
        code="quantized-checkpoint",
        key=key,
    )

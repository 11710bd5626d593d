"""Add a LoRA adapter to a model: resolve its targets, raise for those that can't train or merge.

PEFT matches an entry of a list with the end of a module's full name, and a string as a regular
expression with the full name.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, bad_value, counted
from attnimg.train.expert_adapters import adapting_quantized, is_parametrized, named_weights
from attnimg.train.saved_adapter import saved_settings

if TYPE_CHECKING:
    pass

ALL_LINEAR = "all-linear"
# Names of linear layers in transformers' models. Lists of them are copied between configs, so that
# a name that this model lacks is not a typo.
_OF_OTHER_MODELS = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj",
     "down_proj", "gate_up_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "fc1",
     "fc2", "w1", "w2", "w3", "in_proj", "x_proj", "dt_proj", "dense", "query_key_value",
     "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "c_fc", "Wqkv"}
)  # fmt: skip

# Linear layers of transformers whose forward does not return a linear layer's result, so that
# PEFT's wrapper raises on them. Source: transformers 5.22.2, modeling_llama4.py:140,
# modeling_phimoe.py:462, modeling_deepseek_v4.py:300 (2026-11-27).
_OTHER_LINEAR = frozenset({"Llama4Router", "PhimoeTopKRouter", "DeepseekV4GroupedLinear"})


def add_adapter(model: Any, config: Config) -> Any:
    """Wrap `model` in a PEFT model with the config's LoRA; its other weights are frozen.

    Raises:
        AttnimgError: a module that the config names does not exist in the model, or can't be
            adapted (bad-value).
    """
    from peft import get_peft_model

    frozen = freeze_other_parts(model)
    lora = saved_settings(config) if config.lora_model_dir else _settings(model, config, frozen)
    adaptable = find_adaptable_modules(model, config)
    try:
        with warnings.catch_warnings():
            # PEFT warns if no target is in an excluded module, which is fine.
            warnings.filterwarnings("ignore", message="You have passed exclude_modules")
            # A false alarm: PEFT searches for the experts' parameters among the modules.
            warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys")
            with adapting_quantized(lora):
                adapted = get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise bad_value(
            "lora_target_modules",
            "the adapter does not fit the model",
            why=_peft_reason(error),
            do=advice_for_adapter(adaptable, config, error),
        ) from error
    if config.lora_model_dir:
        _require_adaptable_loss(adapted)
    else:
        _require_patterns(adapted, config)
    return adapted


def _settings(model: Any, config: Config, frozen: tuple[str, ...]) -> Any:
    """Return PEFT's LoraConfig of the adapter that the config describes.

    Args:
        model: a transformers model.
        config: the validated run.
        frozen: modules outside of the language model.
    """
    from peft import LoraConfig

    _require_layers(model, config)
    targets = resolve_targets(model, config)
    if config.peft_layers_to_transform:
        # PEFT compares the layers of short names in a list only.
        names = list_adaptable(model, linear=True) if targets == ALL_LINEAR else targets
        targets = sorted({last_part(name) for name in names})
    require_modules_to_save(model, config)
    names, tied = find_embeddings(model)
    saved = config.lora_modules_to_save or []
    return LoraConfig(
        # Without a task, PEFT writes the model's class into adapter_config.json.
        task_type=None if frozen else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        target_parameters=resolve_parameters(model, config, frozen=frozen),
        exclude_modules=_submodule_pattern(frozen),
        # A copy, since PEFT adds tied modules to the list.
        modules_to_save=list(saved) or None,
        fan_in_fan_out=bool(config.lora_fan_in_fan_out),
        use_dora=bool(config.peft_use_dora),
        use_rslora=bool(config.peft_use_rslora),
        # A copy, since PEFT adds patterns for experts.
        rank_pattern=dict(config.lora_rank_pattern or {}),
        alpha_pattern=dict(config.lora_alpha_pattern or {}),
        # As in axolotl, false is PEFT's default: PEFT's own False would start with random changes.
        init_lora_weights=config.peft_init_lora_weights or True,
        layers_to_transform=config.peft_layers_to_transform or None,
        layers_pattern=config.peft_layers_pattern or None,
        # Tied embeddings stay tied: otherwise training would make them differ.
        ensure_weight_tying=tied and any(matches(saved, name) for name in names),
    )


def _require_layers(model: Any, config: Config) -> None:
    """Raise for a number in peft_layers_to_transform that no layer has (bad-value)."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    layers = config.peft_layers_to_transform or []
    if missing := [number for number in layers if number >= count]:
        key = "peft_layers_to_transform"
        present = [number for number in layers if number < count]
        raise bad_value(
            key,
            f"{key}: the model has no layer {missing[0]}",
            why=f"found {counted(count, 'layer')}, from 0 to {count - 1}",
            do=f"set {key}: {present}" if present else f"remove {key}",
        )


def _require_adaptable_loss(model: Any) -> None:
    """Raise for a saved adapter on the output layer, or on an embedding tied to it (bad-value)."""
    base = model.get_base_model()
    _, tied = find_embeddings(base)
    layers = [base.get_output_embeddings(), *([base.get_input_embeddings()] if tied else [])]
    if any(hasattr(layer, "lora_A") for layer in layers):
        raise bad_value(
            "lora_model_dir",
            "lora_model_dir has an adapter on the output layer, or on an embedding tied to it",
            why="the loss uses the weight of that layer directly, so its adapter would not be "
            "trained",
            do="remove lora_model_dir",
        )


def _require_patterns(model: Any, config: Config) -> None:
    """Raise for a pattern of ranks or alphas that matches no layer of the adapter (bad-value).

    Source: peft 0.21.2, tuners/tuners_utils.py, get_pattern_key (2026-11-27).
    """
    names = {name.partition(".lora_")[0].replace(".base_layer", "")
             for name, _ in model.named_parameters() if ".lora_" in name}  # fmt: skip
    for key in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(config, key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                raise bad_value(
                    key,
                    f"{key}: {pattern} matches no layer with an adapter",
                    why=f"found {', '.join(sorted({last_part(name) for name in names}))}",
                    do=f"correct or remove {pattern} in {key}",
                )


def _peft_reason(error: Exception) -> str:
    """Return PEFT's message in one line, without the module's repr."""
    found = re.match(r"Target module (\w+)\(.* is not supported", str(error), re.DOTALL)
    if found is None:
        return str(error).splitlines()[0]
    return f"found a target of the class {found[1]}; needed a linear layer, an embedding or experts"


def _submodule_pattern(modules: tuple[str, ...]) -> str | None:
    """Return a regular expression for the submodules of modules; None for no modules."""
    return rf"({'|'.join(re.escape(name) for name in modules)})\..*" if modules else None


def adapter_notes(model: Any, config: Config) -> list[str]:
    """Return notes for the user on the adapter of a model."""
    lora = getattr(model, "peft_config", {}).get("default")
    if lora is None:
        return []
    notes = []
    if config.lora_model_dir:
        notes.append(f"lora_model_dir: training starts with the adapter in {config.lora_model_dir}")
    if lora.ensure_weight_tying:
        names, _ = find_embeddings(model.get_base_model())
        leaves = " and ".join(last_part(name) for name in names)
        notes.append(
            f"lora_modules_to_save: {leaves} are tied in the base model: both are trained, and "
            "stay one weight"
        )
    entries = config.lora_target_modules
    if isinstance(entries, list) and (absent := _absent_layers(model, entries)):
        notes.append(
            f"lora_target_modules: a {model.config.model_type} model has no "
            f"{' and no '.join(absent)}; the other layers get an adapter"
        )
    without = sorted(_experts_without_adapter(model))
    if without and _targets_experts(config):
        notes.append(
            f"the experts' weights ({', '.join(without)}) get no adapter and are not trained: PEFT "
            f"does not support them in a {model.config.model_type} model"
        )
    return notes


def _absent_layers(model: Any, entries: list[str]) -> list[str]:
    """Return the names of other models' layers in lora_target_modules that a model lacks."""
    ends = {last_part(name) for name, _ in model.named_modules()}
    return [entry for entry in entries if entry in _OF_OTHER_MODELS and entry not in ends]


def _experts_without_adapter(model: Any) -> set[str]:
    """Return the last part of the names of experts' frozen parameters without an adapter."""
    return {
        last_part(name)
        for name, weight in named_weights(model)
        if (weight.dim() > 2 or str(weight.dtype) == "torch.uint8")  # quantized to 4 bits
        and ".experts." in name and ".base_layer." not in name and not weight.requires_grad
    }  # fmt: skip


def _targets_experts(config: Config) -> bool:
    """Return whether the targets name the layers of a feed-forward block, or all layers."""
    targets = config.lora_target_modules
    if not targets or config.lora_target_linear:
        return True
    text = targets if isinstance(targets, str) else " ".join(targets)
    return bool(re.search(r"(?i)all-linear|(gate|up|down)(_up)?_proj|\bw[123]\b|experts", text))


def resolve_targets(model: Any, config: Config) -> list[str] | str:
    """Return the config's targets in PEFT's form: names, a regular expression or all-linear.

    Raises:
        AttnimgError: a target matches no module, or an adapter on it could not be trained or merged
            (bad-value).
    """
    targets = config.lora_target_modules
    if config.lora_target_parameters and not (targets or config.lora_target_linear):
        return []
    if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        others = any(type(module).__name__ in _OTHER_LINEAR for module in model.modules())
        return list_adaptable(model, linear=True) if others else ALL_LINEAR
    names = _adaptable_names(model)
    found = {name for name in names if matches(targets, name)}
    if isinstance(targets, str):
        if not found:
            raise _no_match(targets, model)
    elif missing := [entry for entry in targets if not matching_names(entry, names)]:
        layers = [*list_adaptable(model), *list_expert_names(model)]
        fused = _original_names(model)
        if not found or not set(missing) <= _OF_OTHER_MODELS - fused.keys():
            raise _unknown_names("lora_target_modules", missing, layers, kept=targets, fused=fused)
    _refuse_embeddings(model, found, config)
    if not config.lora_target_linear:
        return targets
    every = {*list_adaptable(model, linear=True), *list_expert_names(model)}
    return ALL_LINEAR if found <= every else sorted(found | every)


def resolve_parameters(
    model: Any, config: Config, *, frozen: tuple[str, ...] = ()
) -> list[str] | None:
    """Return the config's lora_target_parameters; None where it has none.

    Args:
        model: a transformers model.
        config: the validated run.
        frozen: modules outside of the language model.

    Raises:
        AttnimgError: an entry names no weight, or one that an adapter would not train (bad-value).
    """
    key, targets = "lora_target_parameters", config.lora_target_parameters
    if not targets:
        return None
    names = [name for name, _ in named_weights(model)]
    if missing := [entry for entry in targets if not matching_names(entry, names)]:
        raise _unknown_names(key, missing, _parameter_names(model), kept=targets)
    embeddings, _ = find_embeddings(model)
    wrong = [
        entry
        for entry in targets
        for name in matching_names(entry, names)
        if name.rpartition(".")[0] in embeddings
        or any(name.startswith(f"{part}.") for part in frozen)
    ]
    if wrong:
        rest = [entry for entry in targets if entry not in wrong]
        raise bad_value(
            key,
            f"{key} can't contain {wrong[0]}",
            why="found an embedding, whose weight the loss uses directly, or a part outside of the "
            "language model; an adapter on it would not be trained",
            do=f"set {key}: {yaml_list(rest)}" if rest else f"remove {key}",
        )
    return list(targets)


def _parameter_names(model: Any) -> list[str]:
    """Return the names of weights that belong to no layer of their own, such as fused experts."""
    fused = [name for name, weight in named_weights(model) if weight.dim() > 2]
    return fused or [name for name, _ in named_weights(model)]


def find_targets(model: Any, config: Config) -> set[str]:
    """Return the full names of the layers that the config's targets match.

    Raises:
        AttnimgError: as `resolve_targets` does.
    """
    targets = resolve_targets(model, config)
    if targets == ALL_LINEAR:
        return {*list_adaptable(model, linear=True), *list_expert_names(model)}
    return {name for name in _adaptable_names(model) if matches(targets, name)}


def _adaptable_names(model: Any) -> list[str]:
    """Return the names that targets can match: modules, and the layers fused in experts."""
    modules = (name for name, _ in model.named_modules() if name and not is_parametrized(name))
    return [*modules, *list_expert_names(model)]


def list_adaptable(model: Any, *, linear: bool = False) -> list[str]:
    """List the modules that an adapter may be put on, without the output layer.

    Args:
        model: a transformers model.
        linear: whether to leave out embeddings, as all-linear does.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    kinds = (torch.nn.Linear, Conv1D) if linear else (torch.nn.Linear, Conv1D, torch.nn.Embedding)
    output = model.get_output_embeddings()
    return [name for name, module in model.named_modules()
            if isinstance(module, kinds) and module is not output
            and type(module).__name__ not in _OTHER_LINEAR]  # fmt: skip


def list_expert_names(model: Any) -> list[str]:
    """Return the names by which PEFT adapts experts, whose layers are fused parameters."""
    return [
        f"{name.removesuffix(now)}{earlier}"
        for name, _ in named_weights(model)
        for now, before in _original_names(model).items()
        if name.endswith(f".experts.{now}")
        for earlier in before
    ]


def _original_names(model: Any) -> dict[str, list[str]]:
    """Return the names of an experts' parameter -> the earlier names of the layers in it.

    Source: peft 0.21.2, utils/transformers_weight_conversion.py, _convert_peft_config_moe
    (2026-11-27).
    """
    from peft.utils import transformers_weight_conversion as conversion

    base = conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    found: dict[str, list[str]] = {}
    for earlier, now in conversion._MOE_TARGET_MODULE_MAPPING.get(base, {}).items():
        found.setdefault(now, []).append(earlier)
    return found


def _refuse_embeddings(model: Any, found: set[str], config: Config) -> None:
    """Raise if the output layer, or an embedding tied to it, would get an adapter."""
    names, tied = find_embeddings(model)
    saved = config.lora_modules_to_save or []
    refused = [
        name
        for name in (names if tied else names[1:])
        if name in found and not matches(saved, name)  # PEFT removes those from the targets
    ]
    if not refused:
        return
    leaf = last_part(refused[0])
    why = f"the loss uses the weight of {leaf} directly, so its adapter would not be trained"
    if tied:
        other = next(last_part(name) for name in names if name != refused[0])
        why = (
            f"{leaf} and {other} are tied in this model: an adapter on one of them would be "
            "merged into both, and the merged model would differ from the trained one"
        )
    rest = sorted({last_part(name) for name in found} - {last_part(name) for name in refused})
    if isinstance(config.lora_target_modules, list):
        rest = [
            entry
            for entry in config.lora_target_modules
            if not set(matching_names(entry, found)) & set(refused)
        ]
    raise bad_value(
        "lora_target_modules",
        f"lora_target_modules can't contain {leaf}",
        why=why,
        do=f"set lora_target_modules: {yaml_list(rest) if rest else ALL_LINEAR}\n"
        f"set lora_modules_to_save: {yaml_list([*saved, leaf])}",
    )


def require_modules_to_save(model: Any, config: Config) -> None:
    """Raise unless each of lora_modules_to_save is a module of the model.

    Raises:
        AttnimgError: code bad-value, with the closest names.
    """
    saved = config.lora_modules_to_save or []
    names = [name for name, _ in model.named_modules() if name]
    missing = [entry for entry in saved if not matching_names(entry, names)]
    if missing:
        raise _unknown_names("lora_modules_to_save", missing, names, kept=saved)


def untrained_embeddings(model: Any, config: Config) -> list[str]:
    """Return the embeddings that lora_modules_to_save lacks for new tokens to be trained."""
    names, tied = find_embeddings(model)
    saved = config.lora_modules_to_save or []
    missing = [name for name in names if not matches(saved, name)]
    return [] if tied and len(missing) < len(names) else [last_part(name) for name in missing]


def find_embeddings(model: Any) -> tuple[list[str], bool]:
    """Return the names of the input and output embeddings, and whether they are tied."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for layer in layers for name, module in model.named_modules() if module is layer]
    weights = [getattr(layer, "weight", None) for layer in layers]
    return names, len(names) == 2 and weights[0] is not None and weights[0] is weights[1]


def _no_match(pattern: str, model: Any) -> AttnimgError:
    """Build the error for a pattern that matches no module; users often mean a name."""
    names = list_adaptable(model)
    leaves = sorted({last_part(name) for name in names})
    parts = [part.strip() for part in pattern.split(",")]
    closest = [difflib.get_close_matches(part, leaves, n=1, cutoff=0.6) for part in parts]
    if all(closest):
        do = f"set lora_target_modules: {yaml_list([match[0] for match in closest])}"
    else:
        linear = sorted({last_part(name) for name in list_adaptable(model, linear=True)})
        do = f"set lora_target_modules: {yaml_list(linear)}"
    return bad_value(
        "lora_target_modules",
        f"lora_target_modules: {pattern} matches no module of the model",
        why="a string is a regular expression that must match a module's full name, such as "
        f"{names[0] if names else 'none'}; for short names use a list\n"
        f"its modules: {', '.join(leaves)}",
        do=f"{do}\nor set lora_target_modules: {ALL_LINEAR}",
    )


def _unknown_names(
    key: str,
    missing: list[str],
    names: list[str],
    *,
    kept: list[str],
    fused: Mapping[str, list[str]] | None = None,
) -> AttnimgError:
    """Build the error for names that no module has, with the closest existing names.

    Args:
        key: the config key.
        missing: names that no module has.
        names: names of the modules.
        kept: the value of the key.
        fused: names of experts' parameters -> the names that PEFT takes for them.
    """
    leaves = sorted({last_part(name) for name in names if not last_part(name).isdigit()})
    parts = {entry: (fused or {}).get(last_part(entry), []) for entry in missing}
    closest = {entry: parts[entry] or _closest_names(entry, leaves, names) for entry in missing}
    fixed = [name for entry in kept
             for name in parts.get(entry) or closest.get(entry, [entry])[:1]]  # fmt: skip
    fixed = list(dict.fromkeys(fixed))
    do = f"set {key}: {yaml_list(fixed)}" if fixed else f"remove {key}"
    if ALL_LINEAR in missing:
        do = f"set {key}: {ALL_LINEAR}"
    kind = "weight" if key == "lora_target_parameters" else "module"
    texts = [f"{entry}: closest {', '.join(closest[entry]) or '(none)'}" for entry in missing]
    return bad_value(
        key,
        f"{key}: no {kind} of the model is named {', '.join(missing)}",
        why="\n".join((*texts, f"its {kind}s: {', '.join(leaves)}")),
        do=do,
    )


def _closest_names(entry: str, leaves: list[str], names: list[str]) -> list[str]:
    """Return up to three names similar to an entry; a path is also compared by its end."""
    found = difflib.get_close_matches(entry, names, n=3) if "." in entry else []
    return found or difflib.get_close_matches(last_part(entry), leaves, n=3, cutoff=0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptableModules:
    """The modules that an adapter can be put on, before PEFT changes the model.

    Attributes:
        linear: names of all linear layers except the output layer.
        named: names of the layers that an adapter can be put on, in and below the run's targets.
        saved_only: targets that can only be trained by lora_modules_to_save, such as norms: modules
            with weights, but without a layer in `named`.
    """

    linear: list[str]
    named: list[str]
    saved_only: list[str]


def find_adaptable_modules(model: Any, config: Config) -> AdaptableModules:
    """Return the modules that an adapter of a run can be put on."""
    targets = config.lora_target_modules or []
    layers = [*list_adaptable(model), *list_expert_names(model)]
    found, saved_only = set[str](), set[str]()
    for name, module in model.named_modules():
        if not matches(targets, name):
            continue
        below = {layer for layer in layers if layer == name or layer.startswith(f"{name}.")}
        found |= below
        if not below and any(True for _ in module.parameters(recurse=False)):
            saved_only.add(last_part(name))
    return AdaptableModules(
        linear=_shorten_names(list_adaptable(model, linear=True), layers),
        named=_shorten_names(found, layers),
        saved_only=sorted(saved_only),
    )


def advice_for_adapter(adaptable: AdaptableModules, config: Config, error: Exception) -> str:
    """Return the edits of the config after which an adapter fits.

    Source: peft 0.21.2, tuners/lora/layer.py, ParamWrapper.__init__, and
    utils/transformers_weight_conversion.py, _convert_peft_config_moe (2026-11-27).

    Args:
        adaptable: the layers of the model before PEFT changed it.
        config: the validated run.
        error: the error that PEFT raised.
    """
    message, targets = str(error), config.lora_target_modules
    linear, saved_only = adaptable.linear, list[str]()
    if "lora_dropout" in message:
        return f"set lora_dropout: 0.0\nor set lora_target_modules: {yaml_list(linear)}"
    if "use_dora" in message:
        return f"set peft_use_dora: false\nor set lora_target_modules: {yaml_list(linear)}"
    if "without also targeting" in message and isinstance(targets, list):
        partners = re.findall(
            r"\w+", message.partition("also targeting ")[2].partition(" because")[0]
        )
        linear = list(dict.fromkeys([*targets, *partners]))
    elif message.startswith("Target module ") and targets:
        linear, saved_only = adaptable.named or linear, adaptable.saved_only
    else:
        linear = [name for name in linear if f"'{name}'" not in message]
    do = f"set lora_target_modules: {yaml_list(linear)}"
    saved = [*(config.lora_modules_to_save or ()), *saved_only]
    return f"{do}\nset lora_modules_to_save: {yaml_list(saved)}" if saved_only else do


def _shorten_names(names: Any, layers: list[str]) -> list[str]:
    """Return the last parts of names; full names where other layers have the same last part."""
    others = {last_part(layer) for layer in layers if layer not in names}
    return sorted({name if last_part(name) in others else last_part(name) for name in names})


def matches(targets: list[str] | str, name: str) -> bool:
    """Return whether targets match the full name of a module, by PEFT's rule."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(matching_names(entry, [name]) for entry in targets)


def matching_names(entry: str, names: Iterable[str]) -> list[str]:
    """Return the names that an entry of a list matches, by PEFT's rule."""
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def last_part(name: str) -> str:
    """Return the last part of a module's full name."""
    return name.rpartition(".")[2]


def yaml_list(names: list[str]) -> str:
    """Return names as a YAML list."""
    return f"[{', '.join(names)}]"


def freeze_other_parts(model: Any) -> tuple[str, ...]:
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

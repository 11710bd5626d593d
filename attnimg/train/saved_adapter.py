"""Continue the training of a saved adapter, which lora_model_dir names.

axolotl uses the settings that were saved with the adapter, and ignores those of the config. Here
the saved settings are used for the keys that the config does not set; the other keys must agree.
Source: axolotl 0.19.0, loaders/adapter.py, load_lora (2026-11-27)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

from attnimg.config.schema import Config, has_reference
from attnimg.errors import AttnimgError, bad_value, exception_text
from attnimg.files import read_regular
from attnimg.train.model_files import hash_files
from attnimg.train.pickled_weights import require_safetensors

KEY = "lora_model_dir"
# PEFT's name of a setting -> the key of the config.
_SETTINGS = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "modules_to_save": "lora_modules_to_save", "fan_in_fan_out": "lora_fan_in_fan_out",
    "use_dora": "peft_use_dora", "use_rslora": "peft_use_rslora",
}  # fmt: skip
# Keys that choose layers, or set ranks of some layers.
_LAYERS = (
    "lora_target_modules", "lora_target_linear", "lora_target_parameters", "lora_rank_pattern",
    "lora_alpha_pattern", "peft_layers_to_transform", "peft_layers_pattern",
)  # fmt: skip
_FILES = ("adapter_config.json", "adapter_model.safetensors")
_MAX_BYTES = 1 << 20


def with_saved_adapter(config: Config) -> Config:
    """Return a config with the settings of the adapter that it continues.

    Raises:
        AttnimgError: there is no such adapter, or its settings can't be read (bad-model), or its
            weights are pickled (pickled-weights); a key contradicts it, or it is not a LoRA adapter
            (bad-value).
    """
    if config.lora_model_dir is None or config.adapter is None:
        return config
    folder = _find_folder(config.lora_model_dir)
    saved = _read_settings(folder)
    needed = {"peft_type": "LORA", "bias": "none", "trainable_token_indices": None}
    found = {name: saved.get(name, value) for name, value in needed.items()}
    if found != needed:
        raise bad_value(
            KEY,
            f"{KEY}: {config.lora_model_dir} is not an adapter that can be continued",
            why=f"found {found}; needed {needed}",
            do=f"remove {KEY}",
        )
    update: dict[str, Any] = {}
    for name, key in _SETTINGS.items():
        value, given = saved.get(name), getattr(config, key)
        if key not in config.model_fields_set or given is None:
            update[key] = value
        elif _comparable(given) != _comparable(value):
            raise bad_value(
                key,
                f"{key} contradicts {KEY}",
                why=f"found {given}; the adapter in {config.lora_model_dir} has {value}",
                do=f"remove {key}, which is then taken from the adapter",
            )
    try:
        return Config.model_validate(config.model_dump(exclude_unset=True) | update)
    except ValidationError as error:
        raise _unreadable(folder, exception_text(error)) from error


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of an adapter; those that its file does not have are PEFT's defaults.

    Raises:
        AttnimgError: code bad-model.
    """
    from peft import LoraConfig

    try:
        saved = json.loads(read_regular(folder / "adapter_config.json", at_most=_MAX_BYTES))
        if not isinstance(saved, dict):
            raise TypeError(f"found a {type(saved).__name__}, needed a mapping")
        for name in ("target_modules", "modules_to_save", "target_parameters"):
            if not isinstance(value := saved.get(name), list | str | None):
                raise TypeError(f"{name} is {value!r}, needed names")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _unreadable(folder, exception_text(error)) from error
    defaults = LoraConfig()
    return {name: getattr(defaults, name) for name in _SETTINGS} | saved


def _unreadable(folder: Path, why: str) -> AttnimgError:
    return AttnimgError(
        f"{folder / 'adapter_config.json'} can't be used",
        why=why,
        do=f"copy the adapter again, or remove {KEY}",
        code="bad-model",
        key=KEY,
    )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value or None


def _find_folder(name: str) -> Path:
    """Return the folder of an adapter: a local one, or one in the cache of the hub."""
    folder = Path(os.path.expanduser(name))  # noqa: PTH111  Path's raises for an unknown user
    if folder.is_dir():
        require_safetensors(folder, key=KEY)
        missing = [file for file in _FILES if not (folder / file).is_file()]
    else:
        from transformers.utils import cached_file

        try:
            found = [cached_file(name, file) for file in _FILES]
            missing = [file for file, path in zip(_FILES, found, strict=True) if path is None]
            folder = Path(found[0] or "").parent
        except (OSError, ValueError):
            missing = list(_FILES)
    if missing:
        raise AttnimgError(
            f"{KEY}: {name} has no adapter",
            why=f"found no {' and no '.join(missing)}",
            do=f"set {KEY} to the output_dir of a run with an adapter, or to a checkpoint in it",
            code="bad-model",
            key=KEY,
        )
    return folder


def saved_settings(config: Config) -> Any:
    """Return PEFT's LoraConfig of the adapter that a run continues."""
    from peft import LoraConfig

    settings = LoraConfig.from_pretrained(str(_find_folder(config.lora_model_dir or "")))
    settings.inference_mode = False
    settings.init_lora_weights = True  # the weights are loaded after it
    return settings


def hash_reference_adapter(config: Config) -> dict[str, Any] | None:
    """Return the SHA-256 of each file of the adapter that is the reference; None without one.

    Raises:
        AttnimgError: there is no such adapter, or a file can't be read (bad-model).
    """
    if not (config.adapter and config.lora_model_dir and has_reference(config)):
        return None
    folder = _find_folder(config.lora_model_dir)
    files = hash_files(folder, [folder / name for name in _FILES])
    return {"path": config.lora_model_dir, "revision": None, "files": files}


def load_saved_weights(model: Any, config: Config) -> None:
    """Load the weights of the adapter that a run continues into a PEFT model.

    Raises:
        AttnimgError: they do not fit the model (bad-value).
    """
    folder = _find_folder(config.lora_model_dir or "")
    try:
        loaded = model.load_adapter(str(folder), "default", is_trainable=True)
    except (RuntimeError, SafetensorError) as error:
        raise _unfit(config, "\n".join(str(error).splitlines()[:3]), model) from error
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    wrong = [*loaded.unexpected_keys, *(trained & set(loaded.missing_keys))]
    if wrong:
        raise _unfit(
            config, f"unexpected or missing weights: {', '.join(sorted(wrong)[:3])}", model
        )


def _unfit(config: Config, why: str, model: Any) -> AttnimgError:
    base = model.peft_config["default"].base_model_name_or_path
    return bad_value(
        KEY,
        f"the adapter in {config.lora_model_dir} does not fit the model",
        why=f"{why}\nit was trained on {base}",
        do=f"set base_model to the model that the adapter was trained on, or remove {KEY}",
    )


def require_same_layers(saved: Any, written: Any, config: Config) -> None:
    """Raise if the config's keys choose other layers than the saved adapter has.

    Args:
        saved: the model with the saved adapter; neither model needs weights.
        written: the model with the adapter that the keys describe.
        config: the validated run.

    Raises:
        AttnimgError: code bad-value.
    """
    keys = layer_keys(config)
    shapes = [{name: weight.shape for name, weight in model.named_parameters()
               if weight.requires_grad} for model in (saved, written)]  # fmt: skip
    if shapes[0] == shapes[1]:
        return
    names = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in shapes[0]
                    if ".lora_" in name})  # fmt: skip
    raise bad_value(
        keys[0],
        f"{' and '.join(keys)} contradict{'s' if len(keys) == 1 else ''} {KEY}",
        why=f"they choose other layers or ranks than the adapter has; it is on {', '.join(names)}",
        do="\n".join(f"remove {key}" for key in keys),
    )


def layer_keys(config: Config) -> list[str]:
    """Return the keys of a config that choose layers, or set ranks of some layers."""
    return [key for key in _LAYERS if getattr(config, key)]

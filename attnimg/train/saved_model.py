"""Correct the dtype and the settings of a saved model, so that it loads as it was trained."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.config.schema import Config
from attnimg.train import checkpoint as checkpoints
from attnimg.train.base_model import keep_processor
from attnimg.train.checkpoint import writing
from attnimg.train.model_files import TORCH_NAMES, stored_tensors

# Settings that trainers change for training, and that must not be saved with the model.
_TRAINERS = ("use_cache", "output_router_logits")


def correct_saved_config(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Set the dtype in a saved config.json, and the settings that the loaded model had.

    transformers writes the dtype of the first weight, an embedding, which is float32 in training
    even where most layers are bfloat16. The dtype of most saved weights is written instead. A
    folder without config.json, such as an adapter's, is not changed.

    Args:
        folder: where save_pretrained has written.
        loaded: the model's config before training, as `to_dict` gives it.
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    dtype = _dtype_of(folder)
    for name in (None, *(key for key, value in config.items() if isinstance(value, dict))):
        part, before = (config, loaded) if name is None else (config[name], loaded.get(name) or {})
        if dtype and (name is None or "dtype" in part):
            part["dtype"] = dtype
        for key in _TRAINERS:
            if key in before:
                part[key] = before[key]
            else:
                part.pop(key, None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _dtype_of(folder: Path) -> str | None:
    """Return the dtype of most of the numbers in a folder's weights; None without weights."""
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        if tensor.dtype in TORCH_NAMES:
            sizes[TORCH_NAMES[tensor.dtype]] += tensor.count
    return sizes.most_common(1)[0][0] if sizes else None


def restore_loaded_dtypes(model: Any) -> None:
    """Cast weights that were float32 for training only back to the dtype they were loaded in.

    Args:
        model: after training.
    """
    import torch

    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper renames weights
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in getattr(model, "attnimg_loaded_dtypes", {}).items():
        with torch.no_grad():
            weights[name].data = weights[name].data.to(dtype)


# What Trainer writes beside a model that only Trainer reads.
NOT_THE_MODEL = ("training_args.bin",)


def save_final(engine: Any, config: Config, folder: Path) -> list[Path]:
    """Write model and tokenizer aside, then move them into `folder` file by file.

    Args:
        engine: after training; every process calls this, since gathering weights is collective.
        config: the validated run.
        folder: output_dir.

    Returns:
        The files, weights first; empty on every process but the first.

    Raises:
        AttnimgError: the disk is full; the checkpoints are untouched (disk-full).
    """
    aside = folder / checkpoints.PARTIAL / "model"
    try:
        with writing(aside, kept="the checkpoints are kept"):
            restore_loaded_dtypes(engine.model)
            engine.save_model(str(aside))
            if not engine.is_world_process_zero():
                return []
            correct_saved_config(aside, engine.loaded_config)
            keep_processor(config, engine.loaded_config, aside)
            names = _move_into(folder, aside)
    finally:
        if engine.is_world_process_zero():
            shutil.rmtree(folder / checkpoints.PARTIAL, ignore_errors=True)
    return [folder / name for name in reversed(names)]


def _move_into(folder: Path, aside: Path) -> list[str]:
    """Move the finished files, weights last: a folder that has them is whole."""
    for name in NOT_THE_MODEL:
        (aside / name).unlink(missing_ok=True)
    checkpoints.open_to_others(aside)
    names = sorted((p.name for p in aside.iterdir()), key=lambda name: name.endswith("safetensors"))
    for name in names:
        (aside / name).replace(folder / name)
    return names

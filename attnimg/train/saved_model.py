"""Correct the dtype and the settings of a saved model, so that it loads as it was trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.train.safetensors_headers import TORCH_NAMES, stored_tensors

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

"""Make what is saved load as what was trained, in its dtype and with its settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.train.safetensors_headers import TORCH_NAMES, stored_tensors

# Settings that trainers change for training, whatever is generated with the model later.
_TRAINERS = ("use_cache", "output_router_logits")


def correct_saved_config(folder: Path, loaded: Mapping[str, Any]) -> None:
    """Make a saved config.json say what its weights are, and what the loaded model's said.

    transformers writes the dtype of the first weight, which is an embedding, and embeddings are
    float32 beside bfloat16 layers during training: the dtype that most of the saved weights have is
    written. A folder without config.json, as an adapter's, stays as it is.

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
    """Return the dtype that most of a folder's stored numbers have; None without weights."""
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(folder).values():
        if tensor.dtype in TORCH_NAMES:
            sizes[TORCH_NAMES[tensor.dtype]] += tensor.count
    return sizes.most_common(1)[0][0] if sizes else None


def restore_loaded_dtypes(model: Any) -> None:
    """Cast the weights that were lifted to float32 for training back to what they were loaded in.

    Args:
        model: after its training.
    """
    import torch

    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper names them otherwise
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, dtype in getattr(model, "attnimg_loaded_dtypes", {}).items():
        with torch.no_grad():
            weights[name].data = weights[name].data.to(dtype)

"""Load a checkpoint's weights that transformers saves under other names than the model has.

The experts of Mixtral, Qwen3-MoE, GraniteMoe and others are one tensor in the model, and many in
its files. Trainer loads a checkpoint by `load_state_dict(..., strict=False)`
(transformers 5.22.2, trainer.py, _load_from_checkpoint, 2026-11-27), which does not
load such weights: a resumed run would start with untrained experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_renamed(model: Any, folder: Path) -> bool:
    """Load a checkpoint with from_pretrained, where the model lacks one of its names.

    Args:
        model: a transformers model, with the checkpoint's other weights.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded; False where the model has all names.
    """
    import torch
    from safetensors import safe_open

    saved: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= set(tensors.keys())
    if saved <= set(model.state_dict()):
        return False
    # float32 represents weights of every dtype exactly, so copying does not round.
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    model.load_state_dict(loaded.state_dict())
    return True

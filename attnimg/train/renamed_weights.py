"""Load a checkpoint's weights that transformers saves under other names than the model has.

The experts of Mixtral, Qwen3-MoE, GraniteMoe and others are one tensor in the model and many in the
file, as they were published. Trainer loads a checkpoint by `load_state_dict(..., strict=False)`
(transformers 5.22.2, trainer.py, _load_from_checkpoint, 2026-11-27), which leaves such weights as
they are: a resumed run would train untrained experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_renamed(model: Any, folder: Path) -> bool:
    """Load the weights of a checkpoint by the model's own loader, where a name in it is unknown.

    Args:
        model: a transformers model, with the checkpoint's other weights.
        folder: the checkpoint.

    Returns:
        Whether the weights were loaded; not where all names are the model's.
    """
    import torch
    from safetensors import safe_open

    saved: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved |= set(tensors.keys())
    if saved <= set(model.state_dict()):
        return False
    # float32 holds every weight of a mixed model exactly; copying rounds none.
    loaded = type(model).from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    return True

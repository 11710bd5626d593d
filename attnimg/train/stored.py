"""Read what a model's files hold: names, dtypes and shapes, no weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A header of a hundred thousand tensors is 15 MB; more is no header.
_MAX_HEADER = 100 * 2**20
# safetensors' names of the dtypes that whole weights have -> torch's.
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Those of quantized numbers.
_QUANTIZED_NAMES = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U8": "uint8", "I8": "int8",
    "I32": "int32",
}  # fmt: skip
# Buffers that older versions of transformers saved, and that are computed now.
_COMPUTED = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor of a file: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a model folder's files, name -> what is stored.

    Of safetensors, files that an index lists count; without one, model.safetensors, or all there
    are; without any, pytorch_model*.bin. What can't be read is left to the loader, which says so.
    """
    found: dict[str, Stored] = {}
    files = _files(folder)
    for file in files:
        for name, entry in _header(file).items():
            if name != "__metadata__":
                found[name] = Stored(dtype=entry["dtype"], shape=tuple(entry["shape"]))
    for file in () if files else sorted(folder.glob("pytorch_model*.bin")):
        found |= _pickled(file)
    return found


def unused_weights(model: Any, stored: Iterable[str], unexpected: Iterable[str]) -> tuple[str, ...]:
    """Return the stored weights that a loaded model has no place for, sorted.

    Args:
        model: a transformers model.
        stored: the names in its checkpoint.
        unexpected: what from_pretrained told of them; it leaves out what its class ignores, such as
            layers that predict several tokens.
    """
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    names = {name for name in stored if any(pattern.search(name) for pattern in ignored)}
    return tuple(sorted(name for name in names | set(unexpected) if not name.endswith(_COMPUTED)))


def _files(folder: Path) -> list[Path]:
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = folder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    return [folder / name for name in names]


def _header(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            return dict(json.loads(stream.read(length))) if length < _MAX_HEADER else {}
    except (OSError, ValueError):
        return {}


def _pickled(file: Path) -> dict[str, Stored]:
    """Return the tensors of a file of torch.save, whose weights are not read."""
    import pickle

    import torch

    names = {getattr(torch, torch_name): name
             for name, torch_name in (TORCH_NAMES | _QUANTIZED_NAMES).items()}  # fmt: skip
    try:
        tensors = torch.load(file, map_location="meta", weights_only=True)
        return {
            name: Stored(
                dtype=names.get(tensor.dtype, str(tensor.dtype)), shape=tuple(tensor.shape)
            )
            for name, tensor in tensors.items()
            if isinstance(tensor, torch.Tensor)
        }
    except (OSError, ValueError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError):
        return {}

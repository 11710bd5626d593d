"""Read names, dtypes and shapes of tensors from the headers of a model's files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnimg.files import open_regular, read_regular

# The header of a hundred thousand tensors has 15 MB; a far longer one is damaged.
_MAX_HEADER = 100 * 2**20
# safetensors' names of the dtypes of weights that are not quantized -> torch's names.
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Endings of buffers that older versions of transformers saved, and that are computed now.
_COMPUTED = ("inv_freq", "masked_bias", "attn.bias", "attention.bias", "position_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the index; without one, model.safetensors, or else all."""
    try:
        text = read_regular(folder / "model.safetensors.index.json", at_most=_MAX_HEADER)
        names = sorted(set(json.loads(text)["weight_map"].values()))
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        whole = folder / "model.safetensors"
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return name -> tensor of the weight files in a model's folder.

    Files that can't be read are left out: loading the model reports them.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, entry in _header(file).items():
            found[name] = StoredTensor(dtype=entry["dtype"], shape=entry["shape"])
    return found


def unused_weights(model: Any, stored: Iterable[str], unexpected: Iterable[str]) -> tuple[str, ...]:
    """Return the stored weights that a loaded model does not use, sorted.

    Args:
        model: a transformers model.
        stored: the names in its checkpoint.
        unexpected: those that from_pretrained reported; it does not report what the class ignores,
            such as layers for multi-token prediction.
    """
    ignored = [re.compile(text) for text in model._keys_to_ignore_on_load_unexpected or ()]
    names = {name for name in stored if any(pattern.search(name) for pattern in ignored)}
    return tuple(sorted(name for name in names | set(unexpected) if not name.endswith(_COMPUTED)))


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Return name -> dtype, shape and data_offsets; empty where the file can't be read."""
    try:
        with open_regular(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < _MAX_HEADER else {}
        return {
            name: {**entry, "shape": tuple(entry["shape"]), "dtype": entry["dtype"]}
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return {}


def damages(file: Path) -> list[str]:
    """Return what is wrong with a file: its header can't be read, or tensors are cut off."""
    if not file.is_file():
        return ["found a pipe, a socket, a device or a folder, needed a file"]
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        ends = [entry["data_offsets"][1] for entry in _header(file).values()]
        needed, found = 8 + length + max(ends), file.stat().st_size
    except OSError as error:
        return [f"it can't be read: {error.strerror or error}"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return ["it has no header of safetensors"]
    return [] if found == needed else [f"found {found:,} bytes, needed {needed:,}"]

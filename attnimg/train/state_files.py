"""Write and read the states of an optimizer, a schedule and random generators without pickle.

A state is nested dicts, lists and tuples of numbers, texts and tensors. `NAME.json` has all of it
but the tensors, which are in `NAME-1.safetensors`, `NAME-2.safetensors`... Reading either runs no
code, whoever wrote it.

The safetensors files are written here and not by the library, whose `save_file` hands out neither
the bytes nor their hash: so the hash is taken from memory while the file is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnimg.train.file_hashes import FileHashes

if TYPE_CHECKING:
    import torch

# A state is written in this many files, within these sizes: several are hashed at a time, and only
# these are in CPU memory.
_PARTS = 16
_SMALLEST, _LARGEST = 32 * 2**20, 2**30
# Source: safetensors 0.8, safetensors/torch.py, _TYPES (2026-11-27).
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


class NotPlain(TypeError):
    """Raised for a state that has an object of another class, such as torchao's tensors."""


def write_state(folder: Path, name: str, state: object, *, step: int, hashes: FileHashes) -> None:
    """Write a state.

    Args:
        folder: an existing folder.
        name: of the files, without their endings.
        state: as `state_dict` returns it; it must stay as it is until the hashes are taken.
        step: optimizer steps done.
        hashes: writes the tensors' files.

    Raises:
        NotPlain: it holds something else than numbers, texts and plain tensors; nothing is written.
    """
    tensors: list[torch.Tensor] = []
    tree = _encoded(state, tensors, {})
    parts = _parts(tensors)
    for number, part in enumerate(parts, 1):
        named = {str(place): _on_cpu(tensors[place]) for place in part}
        hashes.write(folder / f"{name}-{number}.safetensors", _safetensors(named))
    content = {"step": step, "files": len(parts), "state": tree}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def read_state(folder: Path, name: str, *, device: str) -> Any:
    """Return a state that write_state wrote.

    Args:
        folder: where it is.
        name: of the files.
        device: the type of the device that the tensors are for, such as "cpu".

    Raises:
        OSError, ValueError, TypeError, KeyError, SafetensorError: it is not such a state.
    """
    from safetensors import safe_open

    content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    tensors = {}
    for number in range(1, content["files"] + 1):
        with safe_open(folder / f"{name}-{number}.safetensors", framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  a file of tensors is no mapping
                found = file.get_tensor(key)
                # The tensors are views of the file until they are copied to another device.
                tensors[key] = found.clone() if device == "cpu" else found
    return _decoded(content["state"], tensors)


def _parts(tensors: list[torch.Tensor]) -> list[list[int]]:
    """Return the numbers of the tensors of each file."""
    size = min(max(sum(tensor.nbytes for tensor in tensors) // _PARTS, _SMALLEST), _LARGEST)
    parts: list[list[int]] = []
    used = size
    for number, tensor in enumerate(tensors):
        if used >= size:
            parts.append([])
            used = 0
        parts[-1].append(number)
        used += tensor.nbytes
    return parts


def _safetensors(tensors: Mapping[str, torch.Tensor]) -> list[memoryview]:
    """Return the content of a safetensors file, without a copy of the tensors.

    Source: https://github.com/huggingface/safetensors, README.md, "Format" (2026-11-27).
    """
    import torch

    # The reader needs each tensor at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda entry: -entry[1].element_size())
    header, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _dtype(tensor), "shape": list(tensor.shape),
                        "data_offsets": [start, end]}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    flat = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for _, tensor in ordered]
    return [memoryview(len(text).to_bytes(8, "little") + text), *flat]


def _dtype(tensor: torch.Tensor) -> str | None:
    """Return the name that safetensors has for a dtype."""
    return _DTYPES.get(str(tensor.dtype).removeprefix("torch."))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()


def _encoded(value: Any, tensors: list[torch.Tensor], seen: dict[int, int]) -> Any:
    """Return a value as JSON; its tensors, each once, are added to a list."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encoded(entry, tensors, seen) for entry in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(entry, tensors, seen) for entry in value]}
    if isinstance(value, dict):
        return {"dict": [[_key(key), _encoded(found, tensors, seen)]
                         for key, found in value.items()]}  # fmt: skip
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        raise NotPlain(f"found {type(value).__module__}.{type(value).__qualname__}")
    if _dtype(value) is None:
        raise NotPlain(f"found a tensor of {value.dtype}")
    if id(value) not in seen:
        seen[id(value)] = len(tensors)
        tensors.append(value)
    return {"tensor": seen[id(value)]}


def _key(key: object) -> object:
    if not isinstance(key, bool | int | str):
        raise NotPlain(f"found a key of type {type(key).__qualname__}")
    return key


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, found),) = value.items()
    if kind == "tensor":
        return tensors[str(found)]
    if kind == "tuple":
        return tuple(_decoded(entry, tensors) for entry in found)
    return {key: _decoded(entry, tensors) for key, entry in found}

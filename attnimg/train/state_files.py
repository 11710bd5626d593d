"""Write and read the states of an optimizer, a schedule and random generators without pickle.

A state is nested dicts, lists and tuples of numbers, texts and tensors. `NAME.json` has all of it
but the tensors, which are in `NAME-1.safetensors`, `NAME-2.safetensors`... Reading either runs no
code, whoever wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A state is written in this many files, within these sizes: the first are hashed while the others
# are written, and one at a time is in CPU memory.
_PARTS = 16
_SMALLEST, _LARGEST = 64 * 2**20, 4 * 2**30


class NotPlain(TypeError):
    """Raised for a state that has an object of another class, such as torchao's tensors."""


def write_state(
    folder: Path,
    name: str,
    state: object,
    *,
    step: int,
    then: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a state.

    Args:
        folder: an existing folder.
        name: of the files, without their endings.
        state: as `state_dict` returns it.
        step: optimizer steps done.
        then: called with each large file that is written.

    Raises:
        NotPlain: it holds something else than numbers, texts and plain tensors; nothing is written.
    """
    from safetensors.torch import save_file

    tensors: list[torch.Tensor] = []
    tree = _encoded(state, tensors, {})
    parts = _parts(tensors)
    for number, part in enumerate(parts, 1):
        path = folder / f"{name}-{number}.safetensors"
        save_file({str(place): _on_cpu(tensors[place]) for place in part}, path)
        then(path)
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


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as safetensors takes it: on the CPU, contiguous, not a view of another."""
    found = tensor.detach().cpu().contiguous()
    return found.clone() if found.untyped_storage().nbytes() != found.nbytes else found


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

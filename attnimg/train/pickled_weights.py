"""Raise for pickled weights (.bin), and convert them to safetensors.

A pickle can run code while it is loaded, and damage to it is not detected. Usage:

    python -m attnimg.train.pickled_weights FOLDER
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError

# transformers' and PEFT's names. accelerate's pytorch_model_fsdp.bin is another format.
_NAMES = re.compile(r"(pytorch_model(-\d+-of-\d+)?|adapter_model)\.bin")
_INDEX = "pytorch_model.bin.index.json"


def pickled_weights(folder: Path) -> list[Path]:
    """Return the pickled weights of a folder that has no safetensors in their place."""
    pickled = [path for path in sorted(folder.glob("*.bin")) if _NAMES.fullmatch(path.name)]
    has_model = any(folder.glob("model*.safetensors"))
    has_adapter = (folder / "adapter_model.safetensors").exists()
    return [path for path in pickled if not (has_adapter if "adapter" in path.name else has_model)]


def require_safetensors(folder: Path, *, key: str, hub: str | None = None) -> None:
    """Raise for a folder whose weights are pickled.

    Args:
        folder: of a model or a checkpoint.
        key: the config's key that names the folder.
        hub: the model's name on the hub, where the folder is in the hub's cache.

    Raises:
        AttnimgError: code pickled-weights.
    """
    found = pickled_weights(folder)
    if not found:
        return
    names = ", ".join(path.name for path in found[:3]) + (" ..." if len(found) > 3 else "")
    raise AttnimgError(
        f"the weights in {hub or folder} are pickled",
        why=f"found {names}\nneeded safetensors: a pickle can run code while it is loaded",
        do=advice_for_hub(hub) if hub else f"run {convert_command(folder)}",
        code="pickled-weights",
        key=key,
    )


def convert_command(folder: Path | str) -> str:
    """Return the command that converts the weights of a folder."""
    return f"python -m attnimg.train.pickled_weights {shlex.quote(str(folder))}"


def advice_for_hub(name: str) -> str:
    """Return advice on a model of the hub that has only pickled weights."""
    folder = name.rpartition("/")[2]
    return (
        f"run hf download {name} --local-dir {folder} && {convert_command(folder)}, and set "
        f"base_model: {folder}"
    )


def convert(folder: Path) -> list[Path]:
    """Write the pickled weights of a folder as safetensors beside them, without running their code.

    Returns:
        The new files.

    Raises:
        AttnimgError: a file has objects other than tensors (code pickled-weights).
    """
    from safetensors.torch import save_file

    written = []
    for path in pickled_weights(folder):
        new = folder / _new_name(path.name)
        # Tied weights are one tensor under two names; safetensors stores each tensor once.
        tensors = {name: tensor.contiguous().clone() for name, tensor in _load(path).items()}
        save_file(tensors, new.with_name(f".{new.name}.partial"), {"format": "pt"})
        written.append(new)
    if written and (index := folder / _INDEX).is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] = {
            weight: _new_name(name) for weight, name in content["weight_map"].items()
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))
    for new in written:
        new.with_name(f".{new.name}.partial").rename(new)
    return written


def _new_name(name: str) -> str:
    """Return the name of the safetensors for a pickled file: model-00001-of-00002.safetensors."""
    return name.replace("pytorch_model", "model").removesuffix("bin") + "safetensors"


def _load(path: Path) -> Mapping[str, Any]:
    import pickle

    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about other pickle protocols than its own
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _conversion_error(
            path, "found objects other than tensors, or a damaged file"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise _conversion_error(path, "found objects other than named tensors")
    return tensors


def _conversion_error(path: Path, why: str) -> AttnimgError:
    return AttnimgError(
        f"{path} can't be converted",
        why=f"{why}; no code in it was run",
        do="get the weights as safetensors from their publisher",
        code="pickled-weights",
    )


def main(arguments: list[str]) -> int:
    """Convert the folder that the arguments name, and print the new files."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        sys.stderr.write(f"usage: {convert_command('FOLDER')}\n")
        return 2
    try:
        written = convert(Path(arguments[0]))
    except AttnimgError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    for path in written:
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

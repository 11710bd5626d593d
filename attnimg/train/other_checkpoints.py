"""Check a checkpoint without a manifest: of attnimg 0.1.0, transformers' Trainer or axolotl.

It has no hashes, so a changed weight is not detected. What is checked: all files that resuming
needs are there and readable, their steps agree, and reading them runs no code.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pickle import PickleError
from typing import Any

from attnimg.files import read_regular
from attnimg.train import safetensors_headers

# Pickles that transformers and accelerate read, by torch.load(weights_only=True).
_PICKLES = re.compile(r".*\.(pt|pth)|optimizer(_\d+)?\.bin|pytorch_model_fsdp(_\d+)?\.bin")
_MAX_JSON = 256 * 2**20
# Types of the values in trainer_state.json and attnimg.json that resuming reads.
_NUMBER = (int, float)
_TRAINER: Mapping[str, tuple[type, ...]] = {
    "epoch": _NUMBER, "global_step": (int,), "max_steps": (int,), "num_train_epochs": _NUMBER,
    "log_history": (list,), "best_metric": (int, float, type(None)),
    "best_global_step": (int, type(None)), "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": (dict,), "total_flos": _NUMBER,
}  # fmt: skip
_RUN: Mapping[str, tuple[type, ...]] = {
    "step": (int,), "tokens": (int,), "window": (dict,), "evaluate_first": (bool,),
    "identity": (dict,),
}  # fmt: skip
_WINDOW: Mapping[str, tuple[type, ...]] = {
    "loss": _NUMBER, "from_step": (int,), "tokens": (int,), "places": (int,), "aux": (list,),
}  # fmt: skip
_IDENTITY: Mapping[str, tuple[type, ...]] = {
    "keys": (dict,), "model": (dict, type(None)), "data": (list, type(None)), "processes": (int,),
    "rows": (int,), "tokens": (int,), "attention": (str,), "precision": (str,),
}  # fmt: skip


def damages(checkpoint: Path, *, step: int) -> list[str]:
    """Return what is wrong with a checkpoint without a manifest, as manifest.damages does."""
    found = [*_trainer_state(checkpoint, step), *_run_state(checkpoint)]
    if (checkpoint / "optimizer.pt").exists() and not (checkpoint / "scheduler.pt").exists():
        found.append("scheduler.pt: it is missing, and the optimizer can't be resumed without it")
    for path in sorted(checkpoint.rglob("*.safetensors")):
        wrong = safetensors_headers.damages(path)
        found += [f"{path.relative_to(checkpoint)}: {text}" for text in wrong]
    return found + _shards(checkpoint) + _states(checkpoint)


def _trainer_state(checkpoint: Path, step: int) -> list[str]:
    content = _json(checkpoint / "trainer_state.json")
    if content is None:
        return ["trainer_state.json: it is no JSON object, or can't be read"]
    from transformers import TrainerState

    name = "trainer_state.json"
    if unknown := sorted(content.keys() - TrainerState.__dataclass_fields__.keys()):
        return [f"{name}: found keys that the installed transformers does not know: "
                f"{', '.join(unknown[:3])}"]  # fmt: skip
    wrong = _mistyped(name, content, _TRAINER)
    if not wrong and content.get("global_step") != step:
        wrong = [f"{name}: found global_step {content.get('global_step')}, needed {step} as in "
                 f"the name of {checkpoint.name}"]  # fmt: skip
    return wrong


def _run_state(checkpoint: Path) -> list[str]:
    path = checkpoint / "attnimg.json"
    if not path.exists():
        return []
    content = _json(path)
    if content is None:
        return ["attnimg.json: it is no JSON object, or can't be read"]
    wrong = _mistyped(path.name, content, _RUN)
    wrong = wrong or _mistyped(path.name, content.get("window", {}), _WINDOW)
    return wrong or _mistyped(path.name, content.get("identity", {}), _IDENTITY)


def _mistyped(
    name: str, content: Mapping[str, Any], types: Mapping[str, tuple[type, ...]]
) -> list[str]:
    """Return the values of the wrong type, and numbers that are negative, NaN or inf."""
    wrong = []
    for key, allowed in types.items():
        value = content.get(key)
        if key not in content:
            continue
        right = isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
        if right and key != "best_metric" and isinstance(value, int | float):
            right = math.isfinite(value) and value >= 0
        if not right:
            text = json.dumps(value)
            shown = text if len(text) < 40 else f"{text[:40]}..."
            wrong.append(f"{name}: found {key}: {shown}, which training can't have written")
    return wrong


def _json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_regular(path, at_most=_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _shards(checkpoint: Path) -> list[str]:
    """Return the shards that an index names and that are not there."""
    name = "model.safetensors.index.json"
    if not (checkpoint / name).exists():
        return []
    content = _json(checkpoint / name) or {}
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(at, str) for at in shards.values()):
        return [f"{name}: it is no index of weights"]
    missing = sorted({at for at in shards.values() if not (checkpoint / at).is_file()})
    return [f"{at}: it is missing, and {name} names it" for at in missing]


def _states(checkpoint: Path) -> list[str]:
    """Return the pickled states that are damaged, or that can only be read by running code."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if _PICKLES.fullmatch(path.name)]
    found = {path.relative_to(checkpoint): _pickle(path) for path in paths}
    return [f"{name}: {text}" for name, text in found.items() if text]


def _pickle(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, whose pickle is parsed but not run."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with suppress(ImportError):  # its optimizers' classes are allowed once it is imported
        import_module("torchao.optim")

    if not path.is_file():
        return "found a pipe, a socket, a device or a folder, needed a file"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            return f"the checksum of its part {damaged.rpartition('/')[2]} differs"
        with safe_globals():
            code = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except OSError as error:
        return f"it can't be read: {error.strerror or error}"
    except (zipfile.BadZipFile, zlib.error, ValueError, RuntimeError, NotImplementedError,
            EOFError, LookupError, TypeError, AttributeError, PickleError):  # fmt: skip
        return "it is cut off, or was not written by torch.save"
    if code:
        return f"reading it would run code: {', '.join(sorted(code)[:3])}"
    return None

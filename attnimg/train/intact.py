"""Check that the files of checkpoints are unchanged since they were written; find an intact one.

With a manifest, each file is compared with its size and SHA-256 in it. A checkpoint without one, as
transformers' Trainer writes it, must at least be readable without running code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path, PurePosixPath
from pickle import PickleError
from typing import Any

from attnimg.errors import AttnimgError
from attnimg.files import map_in_threads, open_regular, read_regular
from attnimg.train.checkpoint import (
    MANIFEST_FILE,
    STATE_FILE,
    checkpoint_step,
    list_checkpoints,
    manifest_hash,
)
from attnimg.train.model_files import JSON_ERRORS, WEIGHT_INDEX, check_safetensors, read_shard_names
from attnimg.train.pickled_weights import require_safetensors

_KEY = "resume_from_checkpoint"

# Limit of a manifest's size: a sharded checkpoint of a thousand processes has about ten thousand
# files, which take 150 bytes each.
_MAX_BYTES = 16 * 2**20

# Names that only a checkpoint with a manifest has: states that saved_states.py wrote.
_OURS = ("optimizer.json", "scheduler.json", "rng_state*.json")

# Files that transformers, PEFT, accelerate or DeepSpeed load if a checkpoint has them. Any other
# added file is not read, and does no harm.
# Source: transformers 5.22.2, trainer.py, _load_from_checkpoint and _load_optimizer_and_scheduler;
# accelerate 1.15, utils/fsdp_utils.py (2026-11-27).
_LOADED = re.compile(
    r".*\.(safetensors|bin|pt|pth|distcp|index\.json)|(adapter_)?config\.json|\.metadata|latest|"
    r"(optimizer|scheduler|rng_state.*|scaler|trainer_state|attnimg)\.json"
)


def find_damage(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint's files, one text for each damage.

    Raises:
        AttnimgError: it has no manifest, and its weights are pickled (code pickled-weights).
    """
    step = checkpoint_step(checkpoint)
    if has_manifest(checkpoint):
        return check_manifest(checkpoint, step=step)
    require_safetensors(checkpoint, key=_KEY)
    return check_without_manifest(checkpoint, step=step)


def find_newest_intact(found: list[Path]) -> tuple[Path | None, dict[Path, list[str]]]:
    """Return the newest intact checkpoint, and the newer ones with what is wrong with each.

    Args:
        found: checkpoints, lowest step first.
    """
    damaged: dict[Path, list[str]] = {}
    for path in reversed(found):
        damage = find_damage(path)
        if not damage:
            return path, damaged
        damaged[path] = damage
    return None, damaged


def checkpoint_notes(checkpoint: Path, damaged: dict[Path, list[str]]) -> tuple[str, ...]:
    """Return lines for the user on an intact checkpoint, and on newer ones that are damaged."""
    notes = [
        f"warning: {path.name} is damaged ({damage[0]}"
        + (f", and {len(damage) - 1} more" if len(damage) > 1 else "")
        + f"): resuming from {checkpoint.name}, the newest intact one"
        for path, damage in damaged.items()
    ]
    if not has_manifest(checkpoint):
        notes.append(
            f"warning: {checkpoint.name} has no manifest: its files can be read, but not "
            "compared with what was written"
        )
        if not any(checkpoint.glob("rng_state*")):
            notes.append(
                f"warning: {checkpoint.name} has no rng_state: dropout uses other random numbers"
            )
    return tuple(notes)


def damaged_error(checkpoint: Path, damage: list[str], *, output_dir: Path) -> AttnimgError:
    """Return the error for a damaged checkpoint; it names the newest intact one in the folder.

    Args:
        checkpoint: the damaged one.
        damage: what is wrong with it.
        output_dir: the run's.
    """
    others = [path for path in list_checkpoints(checkpoint.parent) if path.name != checkpoint.name]
    newest = None
    with suppress(AttnimgError):  # one with pickled weights
        newest = find_newest_intact(others)[0]
    if newest is None:
        do = (
            f"copy {checkpoint.name} again from where it was written: no intact checkpoint is in "
            f"{checkpoint.parent}\nor, for a new run, set another output_dir and remove {_KEY}"
        )
    elif newest.resolve().parent == output_dir.resolve() and checkpoint_step(
        newest
    ) < checkpoint_step(checkpoint):
        do = f"set {_KEY}: true, which resumes from {newest.name}, the newest intact one"
    else:
        do = f"set {_KEY}: {newest}, the newest intact one"
    lines = [*damage[:8], *([f"and {len(damage) - 8} more"] if len(damage) > 8 else [])]
    return AttnimgError(
        f"{checkpoint} is damaged",
        why="\n".join(lines),
        do=do,
        code="damaged-checkpoint",
        key=_KEY,
    )


def has_manifest(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a manifest, or files that only occur with one."""
    return os.path.lexists(checkpoint / MANIFEST_FILE) or any(
        next(checkpoint.glob(name), None) for name in _OURS
    )


def read_checkpoint_hash(checkpoint: Path) -> str | None:
    """Return the hash of an intact checkpoint, from its manifest; None without one."""
    if not has_manifest(checkpoint):
        return None
    found: str = _read_manifest(checkpoint / MANIFEST_FILE)["sha256"]
    return found


def check_manifest(checkpoint: Path, *, step: int) -> list[str]:
    """Return what is wrong with the files of a checkpoint; empty if all are unchanged.

    Args:
        checkpoint: a folder for which `has_manifest` is true.
        step: the step in the folder's name.

    Returns:
        One text for each damage, with what was found and needed, such as
        "model.safetensors: found 100 bytes, needed 200".
    """
    try:
        content = _read_manifest(checkpoint / MANIFEST_FILE)
    except FileNotFoundError:
        return [f"{MANIFEST_FILE}: it is missing, and the other files can't be checked without it"]
    except OSError as error:
        return [f"{MANIFEST_FILE}: it can't be read: {error.strerror or error}"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"{MANIFEST_FILE}: it was changed; the other files can't be checked without it"]
    steps = {"the manifest": content["step"], **content["parts"]}
    found = [
        f"{part}: found step {at}, needed {step} as in the name of {checkpoint.name}"
        for part, at in steps.items()
        if at != step
    ]
    files: Mapping[str, Mapping[str, Any]] = content["files"]
    judged = map_in_threads(lambda name: _check_file(checkpoint / name, files[name]), files)
    found += [f"{name}: {text}" for name, text in zip(files, judged, strict=True) if text]
    found += [f"{name}: it is not in the manifest" for name in _missing_parts(content)]
    return found + [
        f"{name}: found a file that is not in the manifest and would be loaded"
        for name in _unlisted_files(checkpoint, files)
    ]


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest's content.

    Raises:
        OSError: it can't be read.
        ValueError, TypeError, KeyError, AttributeError, RecursionError: it was changed.
    """
    content: dict[str, Any] = json.loads(read_regular(path, at_most=_MAX_BYTES))
    if content["sha256"] != manifest_hash(content):
        raise ValueError("its own hash differs")
    numbers = (content["step"], content["processes"], *content["parts"].values())
    if any(type(number) is not int for number in numbers):
        raise TypeError("a step, or the number of processes, is not a number")
    for name, entry in content["files"].items():
        inside = PurePosixPath(name.encode().decode())  # raises for a lone surrogate
        if inside.is_absolute() or ".." in inside.parts or "\0" in name or not inside.parts:
            raise ValueError("a name points outside of the checkpoint")
        if type(entry["size"]) is not int or entry["size"] < 0:
            raise ValueError("a size is not a number")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError("a hash is not of SHA-256")
    return content


def _missing_parts(content: Mapping[str, Any]) -> list[str]:
    """Return the files that a checkpoint to resume from always has, and a manifest lacks."""
    files, processes = content["files"], content["processes"]
    if not any(name.startswith("optimizer") for name in files):
        return []  # save_only_model: true
    needed = ["trainer_state.json", STATE_FILE]
    if "optimizer.json" in files:
        needed.append("scheduler.json")
    # No more than one above the number of files: a changed number may be huge.
    ranks = range(min(processes, len(files) + 1))
    needed += [f"rng_state_{n}.json" for n in ranks] if processes > 1 else ["rng_state.json"]
    return [name for name in needed if name not in files]


def _check_file(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file; None if it is unchanged."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected["size"]:
                return f"found {size:,} bytes, needed {expected['size']:,}"
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read: {error.strerror or error}"
    if found == expected["sha256"]:
        return None
    return f"found SHA-256 {found[:12]}..., needed {expected['sha256'][:12]}..."


def _unlisted_files(checkpoint: Path, files: Mapping[str, Any]) -> list[str]:
    """Return the files that are not in a manifest, but would be loaded with the checkpoint."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*"))
    return sorted(
        name for name in names if name not in files and _LOADED.fullmatch(name.rpartition("/")[2])
    )


# Pickles that transformers and accelerate read with torch.load(weights_only=True).
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
    "keys": (dict,), "model": (dict, type(None)), "adapter": (dict, type(None)),
    "data": (list, type(None)), "processes": (int,), "rows": (int,), "tokens": (int,),
    "attention": (str,), "precision": (str,),
}  # fmt: skip


def check_without_manifest(checkpoint: Path, *, step: int) -> list[str]:
    """Return what is wrong with a checkpoint without a manifest, as check_manifest does."""
    found = [*_check_trainer_state(checkpoint, step), *_check_run_state(checkpoint)]
    if (checkpoint / "optimizer.pt").exists() and not (checkpoint / "scheduler.pt").exists():
        found.append("scheduler.pt: it is missing, and the optimizer can't be resumed without it")
    for path in sorted(checkpoint.rglob("*.safetensors")):
        wrong = check_safetensors(path)
        found += [f"{path.relative_to(checkpoint)}: {text}" for text in wrong]
    return found + _missing_shards(checkpoint) + _check_pickles(checkpoint)


def _check_trainer_state(checkpoint: Path, step: int) -> list[str]:
    content = _read_json(checkpoint / "trainer_state.json")
    if content is None:
        return ["trainer_state.json: it is not a JSON object, or can't be read"]
    from transformers import TrainerState

    name = "trainer_state.json"
    if unknown := sorted(content.keys() - TrainerState.__dataclass_fields__.keys()):
        return [f"{name}: found keys that the installed transformers does not know: "
                f"{', '.join(unknown[:3])}"]  # fmt: skip
    wrong = _check_types(name, content, _TRAINER)
    if not wrong and content.get("global_step") != step:
        wrong = [f"{name}: found global_step {content.get('global_step')}, needed {step} as in "
                 f"the name of {checkpoint.name}"]  # fmt: skip
    return wrong


def _check_run_state(checkpoint: Path) -> list[str]:
    path = checkpoint / "attnimg.json"
    if not path.exists():
        return []
    content = _read_json(path)
    if content is None:
        return ["attnimg.json: it is not a JSON object, or can't be read"]
    wrong = _check_types(path.name, content, _RUN)
    wrong = wrong or _check_types(path.name, content.get("window", {}), _WINDOW)
    return wrong or _check_types(path.name, content.get("identity", {}), _IDENTITY)


def _check_types(
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
            text = text if len(text) < 40 else f"{text[:40]}..."
            wrong.append(f"{name}: found {key}: {text}, which training never writes")
    return wrong


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(read_regular(path, at_most=_MAX_JSON))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _missing_shards(checkpoint: Path) -> list[str]:
    """Return the missing shards of an index."""
    if not (checkpoint / WEIGHT_INDEX).exists():
        return []
    try:
        shards = read_shard_names(checkpoint)
    except JSON_ERRORS:
        return [f"{WEIGHT_INDEX}: it is not an index of weights"]
    missing = [at for at in shards if not (checkpoint / at).is_file()]
    return [f"{at}: it is missing, and {WEIGHT_INDEX} names it" for at in missing]


def _check_pickles(checkpoint: Path) -> list[str]:
    """Return the pickled states that are damaged, or that can only be read by running code."""
    paths = [path for path in sorted(checkpoint.rglob("*")) if _PICKLES.fullmatch(path.name)]
    found = {path.relative_to(checkpoint): _check_pickle(path) for path in paths}
    return [f"{name}: {text}" for name, text in found.items() if text]


def _check_pickle(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save; its pickle is parsed, but not run."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    with suppress(ImportError):  # its optimizers' classes are allowed once it is imported
        import_module("torchao.optim")

    if not path.is_file():
        return "found a pipe, a socket, a device or a folder, needed a file"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_part = archive.testzip()
        if damaged_part is not None:
            return f"the checksum of its part {damaged_part.rpartition('/')[2]} differs"
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

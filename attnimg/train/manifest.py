"""Write and check the manifest of a checkpoint: the size and SHA-256 of each file, and the steps.

It is the last file that is written, so a checkpoint that has one was written whole. It is checked
before anything of the checkpoint is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from attnimg.files import read_regular
from attnimg.threads import in_threads
from attnimg.train.file_hashes import FileHashes, flush, sha256_of

FILE = "manifest.json"
# A sharded checkpoint of a thousand processes has some ten thousand files of 150 bytes each.
_MAX_BYTES = 16 * 2**20
# Names that only a checkpoint with a manifest has: states that state_files.py wrote.
_OURS = ("optimizer.json", "scheduler.json", "rng_state*.json")
# Where each part of a checkpoint records its step.
_STEPS = {
    "optimizer.json": ("optimizer", "step"),
    "scheduler.json": ("scheduler", "step"),
    "rng_state": ("rng", "step"),
    "trainer_state.json": ("trainer", "global_step"),
    "attnimg.json": ("run", "step"),
}
# Files that transformers, PEFT, accelerate or DeepSpeed would load where a checkpoint has them. Any
# other file that someone added is not read, and does no harm.
# Source: transformers 5.22.2, trainer.py, _load_from_checkpoint and _load_optimizer_and_scheduler;
# accelerate 1.15, utils/fsdp_utils.py (2026-11-27).
_LOADED = re.compile(
    r".*\.(safetensors|bin|pt|pth|distcp|index\.json)|(adapter_)?config\.json|\.metadata|latest|"
    r"(optimizer|scheduler|rng_state.*|scaler|trainer_state|attnimg)\.json"
)


def has_manifest(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a manifest, or files that are only written with one."""
    return os.path.lexists(checkpoint / FILE) or any(
        next(checkpoint.glob(name), None) for name in _OURS
    )


def write_manifest(folder: Path, hashes: FileHashes, *, step: int, processes: int) -> None:
    """Write the manifest of a checkpoint, when all of its files are on the disk.

    Args:
        folder: the checkpoint; all processes have written their files.
        hashes: of the files that were hashed already; the others are hashed now.
        step: optimizer steps that its weights have done.
        processes: how many processes train.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and path != folder / FILE)
    names = sorted(path.relative_to(folder) for path in paths)
    found = hashes.of([folder / name for name in names])
    content: dict[str, Any] = {
        "format": 1,
        "step": step,
        "processes": processes,
        "parts": {"weights": step, **_steps(folder)},
        "files": {
            name.as_posix(): {"size": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, found, strict=True)
        },
    }
    content["sha256"] = _own_hash(content)
    (folder / FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    flush(folder / FILE)


def hash_of(checkpoint: Path) -> str | None:
    """Return the hash in a whole checkpoint's manifest, which is of all files; None without one."""
    if not has_manifest(checkpoint):
        return None
    found: str = _read(checkpoint / FILE)["sha256"]
    return found


def damages(checkpoint: Path, *, step: int) -> list[str]:
    """Return what is wrong with the files of a checkpoint; empty where all are as written.

    Args:
        checkpoint: a folder for which `has_manifest` is true.
        step: the one in the folder's name.

    Returns:
        One text for each damage, with what was found and needed, such as
        "model.safetensors: found 100 bytes, needed 200".
    """
    try:
        content = _read(checkpoint / FILE)
    except FileNotFoundError:
        return [f"{FILE}: it is missing, and the other files can't be checked without it"]
    except OSError as error:
        return [f"{FILE}: it can't be read: {error.strerror or error}"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return [f"{FILE}: it is not as it was written, and the other files can't be checked "
                "without it"]  # fmt: skip
    steps = {"the manifest": content["step"], **content["parts"]}
    found = [
        f"{part}: found step {at}, needed {step} as in the name of {checkpoint.name}"
        for part, at in steps.items()
        if at != step
    ]
    files: Mapping[str, Mapping[str, Any]] = content["files"]
    judged = in_threads(lambda name: _damage(checkpoint / name, files[name]), files)
    found += [f"{name}: {text}" for name, text in zip(files, judged, strict=True) if text]
    return found + [
        f"{name}: found a file that was added later and would be loaded, needed none of this name"
        for name in _added(checkpoint, files)
    ]


def _steps(folder: Path) -> dict[str, int]:
    """Return the step of each part that records one."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        name = "rng_state" if path.name.startswith("rng_state") else path.name
        if name in _STEPS:
            part, key = _STEPS[name]
            found[part] = json.loads(path.read_text(encoding="utf-8"))[key]
    return found


def _read(path: Path) -> dict[str, Any]:
    """Return a manifest's content.

    Raises:
        OSError: it can't be read.
        ValueError, TypeError, KeyError, AttributeError, RecursionError: it was changed.
    """
    content: dict[str, Any] = json.loads(read_regular(path, at_most=_MAX_BYTES))
    if content["sha256"] != _own_hash(content):
        raise ValueError("its own hash differs")
    if any(type(at) is not int for at in (content["step"], *content["parts"].values())):
        raise TypeError("a step is no number")
    for name, entry in content["files"].items():
        inside = PurePosixPath(name.encode().decode())  # raises for a lone surrogate
        if inside.is_absolute() or ".." in inside.parts or "\0" in name or not inside.parts:
            raise ValueError("a name leads out of the checkpoint")
        if type(entry["size"]) is not int or entry["size"] < 0:
            raise ValueError("a size is no number")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise ValueError("a hash is not of SHA-256")
    return content


def _own_hash(content: Mapping[str, Any]) -> str:
    """Return the hash of a manifest without the field that holds it."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, needed: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file; None where it is as it was written."""
    try:
        # O_NONBLOCK: opening a pipe would wait for its writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(handle, "rb", buffering=0) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                return "found a pipe, a socket, a device or a folder, needed a file"
            if about.st_size != needed["size"]:
                return f"found {about.st_size:,} bytes, needed {needed['size']:,}"
            found = sha256_of(file)
    except FileNotFoundError:
        return "it is missing"
    except OSError as error:
        return f"it can't be read: {error.strerror or error}"
    if found == needed["sha256"]:
        return None
    return f"found SHA-256 {found[:12]}..., needed {needed['sha256'][:12]}..."


def _added(checkpoint: Path, files: Mapping[str, Any]) -> list[str]:
    """Return the files that are not in a manifest and that loading the checkpoint would read."""
    names = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*"))
    return sorted(
        name for name in names if name not in files and _LOADED.fullmatch(name.rpartition("/")[2])
    )

"""Have Triton find the kernels that were compiled with the image: SageAttention's."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from attnimg.facts import Machine
from attnimg.machine.kernel_cache.notes import say
from attnimg.machine.shipped_kernels import TRITON_FOLDER

TRITON_CACHE = "TRITON_CACHE_DIR"


def triton_settings(
    machine: Machine, environment: Mapping[str, str], *, shipped: Path = TRITON_FOLDER
) -> dict[str, str]:
    """Copy Triton's entries for this machine's GPUs to its cache, those that are not there.

    Triton names an entry by all that it depends on, so that one too many is never loaded, and those
    of several architectures may lie in one folder.

    Returns:
        Another TRITON_CACHE_DIR where this user can't write the one that is set: Triton would raise
        at the first kernel that it does not find there. Otherwise nothing.
    """
    sources = [
        shipped / arch
        for arch in (machine.arch.name, *machine.other_archs)
        if (shipped / arch).is_dir()
    ]
    if machine.arch.vendor != "nvidia" or not sources:
        return {}
    named, *others = _folders(environment)
    if all(_merged(source, named) for source in sources):
        return {}
    for own in others:
        # What lies there is run: never from a folder that another user can change.
        if _is_ones_own(own) and all(_merged(source, own) for source in sources):
            say(f"Triton can't write {named}; its cache is {own}")
            return {TRITON_CACHE: str(own)}
    tried = " or ".join(map(str, (named, *others)))
    say(f"Triton compiles its kernels anew: no room in {tried}")
    return {}


def _folders(environment: Mapping[str, str]) -> Iterator[Path]:
    """Give where the entries may lie: Triton's cache, or else the temporary folder."""
    home = environment.get("TRITON_HOME") or environment.get("HOME") or str(Path.home())
    yield Path(environment.get(TRITON_CACHE) or Path(home) / ".triton" / "cache").absolute()
    try:
        yield Path(tempfile.gettempdir()) / f"attnimg-triton-{os.getuid()}"
    except FileNotFoundError:  # there is none that this user may write
        return


def _is_ones_own(folder: Path) -> bool:
    """Have a folder; tell whether no other user can write it."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        stat = folder.lstat()
    except OSError:
        return False
    return stat.st_uid == os.getuid() and not stat.st_mode & 0o022


def _merged(source: Path, target: Path) -> bool:
    """Have each entry of a folder in Triton's cache; False where it can't be written.

    Its group file is what makes Triton see an entry, and names the others by where they lie: it
    is written anew, and last. Whoever else does the same meanwhile writes the same (triton 3.8.0,
    runtime/cache.py, read 2026-11-25).
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        if not os.access(target, os.W_OK):
            return False
        for entry in source.iterdir():
            files = {path.name: str(target / entry.name / path.name) for path in entry.iterdir()}
            (told,) = (name for name in files if name.endswith(".json"))
            group = target / entry.name / f"__grp__{told}"
            if _is_whole(group):
                continue
            group.parent.mkdir(exist_ok=True)
            for name in files:
                _put(group.with_name(name), (entry / name).read_bytes())
            _put(group, json.dumps({"child_paths": files}).encode())
    except OSError:  # not writable, or no room
        return False
    return True


def _is_whole(group: Path) -> bool:
    """Tell whether Triton finds all that a group names: a cache may lie elsewhere than it did."""
    try:
        paths = json.loads(group.read_bytes())["child_paths"].values()
        return all(Path(path).exists() for path in paths)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _put(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(f"tmp.attnimg_{os.getpid()}_{threading.get_ident()}_{path.name}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

"""Compile Triton kernels: the functions that build.py and worker.py call.

A set has one part. FOLDER/HASH/ is an entry, in the layout of Triton's cache. "calls" in SET.json
names the module that makes the calls.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from precompiled.entries import check_gpu_code

from attnimg.machine.fingerprint import cache_key, triton_fingerprint

FOREIGN = re.compile(r".*TRITON")
ADVICE = "fix that, or shorten [triton] of the kernel's recipe"
# An entry's other files are the steps between source and machine code: no launch reads them.
SHIPPED = (".cubin", ".json")
# A group has its files' absolute paths; attnimg.machine.kernel_cache rewrites it in the copy.
GROUP = "__grp__"

fingerprint = triton_fingerprint
state_name = cache_key


def parts(asked: dict[str, Any], device: str) -> list[str]:
    """Return a single part: calls share kernels, which several processes would compile twice."""
    return ["all"]


def cache(folder: Path) -> Path:
    """Return the folder of the entries."""
    return folder


def files(entry: Path) -> list[Path]:
    """Return the files of an entry that are shipped."""
    return [
        path
        for path in sorted(entry.iterdir())
        if path.suffix in SHIPPED and not path.name.startswith(GROUP)
    ]


def check(file: Path, code: str) -> None:
    """Exit if the machine code is for another GPU."""
    if file.suffix == ".cubin":
        check_gpu_code(file, code)


def start(asked: dict[str, Any], device: str, folder: Path) -> dict[str, bool]:
    """Set up this process to compile for a GPU; return the entries it looks up from here on."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    from precompiled.triton.stand_in import without_gpu

    without_gpu(device)
    return watch()


def watch() -> dict[str, bool]:
    """Record each entry that Triton looks up from here on: hash -> whether it had to compile it."""
    from triton import knobs
    from triton.runtime.cache import _base32

    entries: dict[str, bool] = {}

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        entries.setdefault(_base32(metadata["hash"]), not cache_hit)

    knobs.compilation.listener = listen
    return entries


def calls(
    asked: dict[str, Any], device: str, part: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each call of the set by name."""
    yield from import_module(asked["calls"]).calls(asked, device)

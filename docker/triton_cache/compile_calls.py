"""Compile the Triton kernels of one compute capability: the worker of build.py.

    python compile_calls.py SET.json DEVICE CACHE RECORD

CACHE becomes Triton's; RECORD tells the entries that the set needs, how many were compiled so far,
and the CPU seconds that cost. What is there already is not compiled again: after a build that was
killed, fewer are told than there are. SET.json names the module that does the calls.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Give those of this process and of the ptxas that it waited for."""
    times = os.times()
    return sum(times[:4])


def watch() -> dict[str, bool]:
    """Note each entry that Triton looks up from here on: hash -> whether it had to compile it."""
    from triton import knobs
    from triton.runtime.cache import _base32

    entries: dict[str, bool] = {}

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
        entries.setdefault(_base32(metadata["hash"]), not cache_hit)

    listener: Callable[..., None] = listen
    knobs.compilation.listener = listener
    return entries


def main(set_file: Path, device: str, cache: Path, record: Path) -> None:
    """Do every call of the set; stop at the first that can't be done."""
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    from stand_in import without_gpu

    asked = json.loads(set_file.read_text())
    without_gpu(device)
    entries = watch()
    began, count = cpu_seconds(), 0
    for name, call in importlib.import_module(asked["calls"]).calls(asked, device):
        call()
        count += 1
        print(f"{device} {name}: {sum(entries.values())} compiled so far", flush=True)
    new, seconds = sum(entries.values()), round(cpu_seconds() - began)
    print(f"{device}: {new} compiled, {seconds} s of CPU", flush=True)
    old = json.loads(record.read_text()) if record.exists() else None
    if old and not new and {*old["entries"]} == {*entries}:
        return
    # Whole or not at all: a build may be killed at any moment.
    part = record.with_name(f".{record.name}.{os.getpid()}")
    told = {"entries": sorted(entries), "calls": count, "compiled": new, "cpu_s": seconds}
    if old:
        told |= {name: old[name] + told[name] for name in ("compiled", "cpu_s")}
    part.write_text(json.dumps(told) + "\n")
    part.replace(record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))

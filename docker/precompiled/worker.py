"""Compile one part of a set for one compute capability: what build.py runs.

    python -m precompiled.worker SET.json DEVICE PART FOLDER

FOLDER becomes the cache of the compiler. FOLDER/calls/PART.json records for each call the entries
that it needs, how many of them were compiled so far, and the CPU seconds that cost. What is there
already is not compiled again, so that an interrupted build goes on. One line a call is printed.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Return those of this process and of the compilers that it waited for."""
    return sum(os.times()[:4])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all: a build may be killed, or another run beside it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main(set_file: Path, device: str, part: str, folder: Path) -> None:
    """Do every call of one part; stop at the first that can't be done."""
    asked = json.loads(set_file.read_text())
    method = import_module(asked["method"])
    (folder / "calls").mkdir(parents=True, exist_ok=True)
    path = folder / "calls" / f"{part}.json"
    records: dict[str, Any] = json.loads(path.read_text())["calls"] if path.exists() else {}
    # Entry -> whether the call that looked it up had to compile it.
    entries: dict[str, bool] = method.start(asked, device, folder)
    asked_for = []
    for name, call in method.calls(asked, device, part):
        entries.clear()
        began = cpu_seconds()
        call()
        new, seconds = sum(entries.values()), cpu_seconds() - began
        print(f"{device} {name}: {new} compiled, {seconds:.1f} s of CPU", flush=True)
        asked_for.append(name)
        old = records.get(name, {"entries": [], "compiled": 0, "cpu_s": 0.0})
        # Other names, though nothing is new: this Python compiled, then another, now this again.
        if new or name not in records or {*old["entries"]} != {*entries}:
            records[name] = {
                "entries": sorted(entries),
                "compiled": old["compiled"] + new,
                "cpu_s": round(old["cpu_s"] + seconds, 2),
            }
            write(path, {"set": asked_for, "calls": records})
    write(path, {"set": asked_for, "calls": records})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))

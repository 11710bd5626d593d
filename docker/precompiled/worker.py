"""Compile one part of a set for one compute capability; build.py runs this.

    python -m precompiled.worker SET.json DEVICE PART FOLDER

FOLDER becomes the cache of the compiler. FOLDER/calls/PART.json records for each call the entries
that it needs, how many of them were compiled so far, and the CPU seconds for that. Existing entries
are not compiled again, so that an interrupted build continues. It prints one line per call.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the compilers that it waited for."""
    return sum(os.times()[:4])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically: a build may be killed, and another may run at the same time."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main(set_file: Path, device: str, part: str, folder: Path) -> None:
    """Make every call of one part; stop at the first that fails."""
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
        # Names can change although nothing was compiled, if another Python ran last.
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

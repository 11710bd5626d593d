"""Measure the CPU seconds of the commands that must be fast, each in a new process.

Prints a table, or with --json one line per command; exits with 1 if a target is missed. `check` is
also compared with the import of its three largest libraries: that ratio holds on any machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 9
CONFIG = Path(__file__).parent.parent / "examples" / "lora.yaml"
# The command, and its target in CPU seconds: twice the import of the three largest libraries
# (0.14 s, 2026-11-27), so that a command feels immediate; `explain` also judges every backend.
COMMANDS = (
    (["--help"], 0.3),
    (["check", str(CONFIG)], 0.3),
    (["check", str(CONFIG), "--json"], 0.3),
    (["explain", str(CONFIG), "--on", "h100"], 0.5),
    (["explain", str(CONFIG), "--on", "h100", "--json"], 0.5),
    (["explain", str(CONFIG)], 0.5),
)
# An installed attnimg has its bytecode. A checkout has none where this variable is set: then each
# start compiles all of attnimg's modules, a seventh of the CPU time of `check`.
_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
IMPORTS = "import pydantic, yaml, rich.console"
RATIO, RATIO_RUNS = 2.0, 20


def cpu_seconds(arguments: list[str]) -> tuple[float, float]:
    """Run Python once; return its CPU seconds (user and system) and its wall seconds."""
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=_ENVIRONMENT,
    )
    _, _, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime, time.monotonic() - began


def main() -> int:
    """Measure every command; see the module's docstring."""
    missed = 0
    for arguments, target in COMMANDS:
        command = ["-m", "attnimg", *arguments]
        cpu_seconds(command)  # fill the bytecode and page caches
        runs = [cpu_seconds(command) for _ in range(RUNS)]
        cpu = statistics.median(seconds for seconds, _ in runs)
        wall = statistics.median(seconds for _, seconds in runs)
        missed += cpu >= target
        text = " ".join(Path(a).name if a == str(CONFIG) else a for a in arguments)
        if "--json" in sys.argv:
            row = {"command": text, "cpu_seconds": cpu, "wall_seconds": wall, "target": target}
            print(json.dumps(row))
        else:
            mark = "ok" if cpu < target else "MISSED"
            print(f"attnimg {text:<42} {cpu:.3f} s of CPU, {wall:.3f} s; < {target} s: {mark}")
    pair = (["-c", IMPORTS], ["-m", "attnimg", "check", str(CONFIG)])
    turns = [[cpu_seconds(command)[0] for command in pair] for _ in range(RATIO_RUNS)]
    imports, check = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
    ratio = check / imports
    missed += ratio > RATIO
    if "--json" in sys.argv:
        print(json.dumps({"command": "check", "times_imports": ratio, "target": RATIO}))
    else:
        mark = "ok" if ratio <= RATIO else "MISSED"
        print(f"check takes {ratio:.2f} times `{IMPORTS}` ({imports:.3f} s); <= {RATIO}: {mark}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare how long OpenMP's threads wait in a loop: tokens/s, alone and with neighbours.

    python benchmarks/spins.py [ROUNDS]

The demo is trained with each number of spins in turn, so that other load on the machine affects
all of them. The number is set, so that attnimg chooses none by the load. The medians go to
docs/measured/spins.json.

On a shared machine, start it in a cgroup with a larger weight than the other processes.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnimg.machine.threads import SPINS_BUSY, SPINS_IDLE

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/spins.json"
ROUNDS = 5
STEPS = 40
# The default of OpenMP's library. Source: libgomp's manual, GOMP_SPINCOUNT (GCC 15, 2026-11-28).
LIBRARY = 300_000
SPINS = (LIBRARY, SPINS_IDLE, SPINS_BUSY)
# Name -> processes that compute beside the demo.
CASES = {"alone": 0, "two busy neighbours": 2}
_SETTINGS = [f"max_steps={STEPS}", "logging_steps=10", "eval_steps=null", "val_set_size=0"]


def main() -> None:
    """Measure every case, print each run, and write the record."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    found: dict[str, dict[int, list[float]]] = {}
    for case, neighbours in CASES.items():
        found[case] = {spins: [] for spins in SPINS}
        with busy(neighbours):
            for _ in range(rounds):
                for spins in SPINS:
                    speed = measure(spins)
                    print(f"{case}, {spins}: {speed:,.0f} tokens/s", flush=True)
                    found[case][spins].append(speed)
    record = settings() | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, shared",
        "rounds": rounds,
        "tokens_per_second": {
            case: {str(spins): round(statistics.median(speeds)) for spins, speeds in runs.items()}
            for case, runs in found.items()
        },
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(record))


def settings() -> dict[str, Any]:
    """Return what is measured, for the test that the record is up to date."""
    return {"steps": STEPS, "spins": list(SPINS), "neighbours": CASES}


def table(record: dict[str, Any]) -> str:
    """Return the rows of docs/cpu-limits.md."""
    speeds = record["tokens_per_second"]
    lines = [f"| rounds | {' | '.join(speeds)} |", "|---" * (len(speeds) + 1) + "|"]
    for spins in record["spins"]:
        cells = [f"{runs[str(spins)]:,}" for runs in speeds.values()]
        lines.append(f"| {spins:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(spins: int) -> float:
    """Train the demo; return the tokens/s of its last steps."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        shutil.copytree(ROOT / "examples", workspace / "examples")
        demo = workspace / "outputs" / "demo"
        program = ROOT / "examples" / "demo" / "prepare.py"
        subprocess.run([sys.executable, program, demo], capture_output=True, check=True)
        # As many threads as attnimg chooses.
        environ = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        environ |= {"GOMP_SPINCOUNT": str(spins), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "attnimg", "train", "examples/demo/demo.yaml", *_SETTINGS]
        subprocess.run(command, cwd=workspace, env=environ, capture_output=True, check=True)
        last = (demo / "trained" / "metrics.jsonl").read_text().splitlines()[-1]
        return float(json.loads(last)["tokens_per_second"])


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run processes that compute, until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()

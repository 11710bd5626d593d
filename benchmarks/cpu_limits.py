"""Compare two images on fewer CPUs than the machine has: seconds of a proof, and tokens/s.

    python benchmarks/cpu_limits.py OLD [ROUNDS [CASE]]

OLD is an image of an earlier commit, such as attnimg-old:cpu; it is compared with attnimg:cpu. They
train the demo in turn, so that other load on the machine affects both, and with a new cache, so
that each proves its kernel. The medians go to docs/measured/cpu-limits.json; with a CASE, such as
"two busy neighbours", the record keeps those of the other cases.

CGROUP_PARENT=/NAME runs all containers in that cgroup, which can have a larger weight than the rest
of a shared machine. `load` is the number of CPUs that other processes used before each run.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnimg.machine.threads import cpu_load

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/cpu-limits.json"
NEW = "attnimg:cpu"
ROUNDS = 3
STEPS = 40
# With no more load than this, attnimg leaves OpenMP's threads as they are.
IDLE = 0.25
# Name -> options of docker run, and processes that compute beside it.
CASES: dict[str, tuple[list[str], int]] = {
    "no limit": ([], 0),
    "--cpus 0.5": (["--cpus=0.5"], 0),
    "--cpus 1": (["--cpus=1"], 0),
    "--cpus 1.5": (["--cpus=1.5"], 0),
    "--cpus 2": (["--cpus=2"], 0),
    "two busy neighbours": ([], 2),
}
# A new image may be this much slower than the old one, by the noise of such a measurement.
NOISE = 0.1
_PROOF = re.compile(r"proof: (\w+) passed \d+ probes, ([\d.]+) s")
_SETTINGS = [f"max_steps={STEPS}", "logging_steps=10", "eval_steps=null", "val_set_size=0"]


def main() -> None:
    """Measure every case, print each run, and write the record."""
    if len(sys.argv) < 2:
        sys.exit(f"cpu_limits: no image is given\n  why: found no OLD\n  do:  {sys.argv[0]} OLD")
    old, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else ROUNDS
    only = sys.argv[3:]
    if unknown := set(only) - CASES.keys():
        sys.exit(
            f"cpu_limits: there is no case {unknown.pop()!r}\n  why: found none of that name\n"
            f"  do:  name one of: {', '.join(CASES)}"
        )
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for case, (options, neighbours) in CASES.items():
        if only and case not in only:
            continue
        found[case] = {"old": [], "new": []}
        with busy(neighbours):
            for _ in range(rounds):
                for side, image in (("old", old), ("new", NEW)):
                    run = measure(image, options)
                    print(f"{case}, {side}: {run}", flush=True)
                    found[case][side].append(run)
    kept = json.loads(RECORD.read_text(encoding="utf-8"))["cases"] if only else {}
    record = settings() | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, shared",
        "rounds": rounds,
        "cases": {
            case: {side: summary(runs) for side, runs in found[case].items()}
            if case in found
            else kept[case]
            for case in CASES
        },
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(table(record))


def settings() -> dict[str, Any]:
    """Return what is measured, for the test that the record is up to date."""
    cases = {case: [*options, f"{busy} beside"] for case, (options, busy) in CASES.items()}
    return {"steps": STEPS, "options": cases}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of some runs; the proof is null if sdpa was not proven in one of them."""
    proofs = [run["proof_s"] for run in runs if run["proof_s"] is not None]
    return {
        "proof_s": statistics.median(proofs) if len(proofs) == len(runs) else None,
        "tokens_per_second": round(statistics.median(run["tokens_per_second"] for run in runs)),
        "load": round(statistics.median(run["load"] for run in runs), 2),
    }


def table(record: dict[str, Any]) -> str:
    """Return the rows of docs/cpu-limits.md."""
    lines = [
        "| where | proof before | now | tokens/s before | now |",
        "|---|---|---|---|---|",
    ]
    for case, sides in record["cases"].items():
        name = f"`{case}`" if case.startswith("--") else case
        cells = [_seconds(sides[side]["proof_s"]) for side in ("old", "new")]
        cells += [f"{sides[side]['tokens_per_second']:,}" for side in ("old", "new")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "time limit exceeded" if value is None else f"{value:.1f} s"


def measure(image: str, options: list[str]) -> dict[str, Any]:
    """Train the demo in a container; return the proof's seconds and the tokens/s of the last steps.

    The proof's seconds are None if sdpa was not proven in its time limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        shutil.copytree(ROOT / "examples", workspace / "examples")
        demo = workspace / "outputs" / "demo"
        program = ROOT / "examples" / "demo" / "prepare.py"
        subprocess.run([sys.executable, program, demo], capture_output=True, check=True)
        command = ["docker", "run", "--rm", "--network=none", "--user=0:0", *_parent(), *options]
        command += [f"--volume={folder}:/workspace", image, "train", "examples/demo/demo.yaml"]
        load = cpu_load(seconds=0.5)
        done = subprocess.run(
            [*command, *_SETTINGS], capture_output=True, text=True, check=False, timeout=1800
        )
        proof = _PROOF.search(done.stderr + done.stdout)
        metrics = demo / "trained" / "metrics.jsonl"
        if done.returncode or not metrics.is_file():  # no backend was proven in time
            return {"proof_s": None, "tokens_per_second": 0, "load": load}
        last = json.loads(metrics.read_text().splitlines()[-1])
        return {
            "proof_s": float(proof[2]) if proof and proof[1] == "sdpa" else None,
            "tokens_per_second": last["tokens_per_second"],
            "load": load,
        }


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Run containers that compute, until the block ends."""
    names = [f"attnimg-busy-{uuid.uuid4().hex[:8]}" for _ in range(number)]
    program = ["--entrypoint=python", NEW, "-c", "while True: pass"]
    for name in names:
        command = ["docker", "run", "--rm", "--detach", f"--name={name}", *_parent(), *program]
        subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        if names:
            subprocess.run(["docker", "kill", *names], check=False, capture_output=True)


def _parent() -> list[str]:
    parent = os.environ.get("CGROUP_PARENT")
    return [f"--cgroup-parent={parent}"] if parent else []


if __name__ == "__main__":
    main()

"""Compare the CPU seconds of a proof for a Llama model with those of an earlier commit.

Proofs of both commits run in turn, each in a process of its own, so that other load on the machine
affects both. Prints the seconds, and writes them to docs/measured/proof-cost.json.

    python benchmarks/proof_cost.py [rounds]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/proof-cost.json"
# The last commit whose proofs test no whole row with all heads and don't compare process state.
BEFORE = "5a8433e"
MAX_RATIO = 1.5
ROUNDS = 3
# Llama 3.2 1B.
HEADS, KV_HEADS, HEAD_DIM, SEQUENCE_LEN, ROWS = 32, 8, 64, 2048, 2
RUNS = {
    "sdpa, packed, float32": ("sdpa", "float32", True),
    "sdpa, packed, bfloat16": ("sdpa", "bfloat16", True),
    "sdpa, one document a row, float32": ("sdpa", "float32", False),
    "eager, packed, bfloat16": ("eager", "bfloat16", True),
}


def main() -> None:
    """Run the proofs of both commits in turn, and write the record."""
    if sys.argv[1:2] == ["prove"]:
        prove(json.loads(sys.argv[2]))
        return
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    found: dict[str, dict[str, list[float]]] = {run: {"before": [], "after": []} for run in RUNS}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), BEFORE], check=True)
        try:
            for _ in range(rounds):
                for run, proof in RUNS.items():
                    for side, source in (("before", tree), ("after", ROOT)):
                        seconds = measure_proof(source, proof)
                        print(f"{run}, {side}: {seconds} s", flush=True)
                        found[run][side].append(seconds)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    runs = {run: summary(**sides) for run, sides in found.items()}
    record = settings() | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, one thread",
        "runs": runs,
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=2))


def settings() -> dict[str, Any]:
    """Return the shape that is proven, for the test that the record is up to date."""
    return {
        "before": BEFORE,
        "shape": {
            "heads": HEADS,
            "kv_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "sequence_len": SEQUENCE_LEN,
            "rows": ROWS,
        },
    }


def summary(*, before: list[float], after: list[float]) -> dict[str, Any]:
    """Return the CPU seconds of each proof, and the ratio of their medians."""
    ratio = statistics.median(after) / statistics.median(before)
    return {"before_cpu_s": before, "after_cpu_s": after, "ratio": round(ratio, 2)}


def measure_proof(source: Path, proof: tuple[str, str, bool]) -> float:
    """Return the CPU seconds of a proof in a new process that imports attnimg from a folder."""
    environment = os.environ | {
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    found = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "prove", json.dumps(proof)],
        env=environment,
        cwd=source,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return float(found.stdout.splitlines()[-1])


def prove(run: list[Any]) -> None:
    """Prove one backend in this process as the worker of a proof does; print the CPU seconds."""
    import importlib
    import inspect
    import io
    import time
    from dataclasses import asdict

    import torch
    import transformers.integrations.flash_attention
    import transformers.modeling_utils  # noqa: F401 - imported before the measurement

    # The modules had other names at BEFORE.
    is_before = Path("attnimg/prove/child.py").exists()
    worker: Any = importlib.import_module(
        "attnimg.prove.child" if is_before else "attnimg.verification.worker"
    )
    facts: Any = importlib.import_module("attnimg.facts" if is_before else "attnimg.run_facts")
    geometry_class = facts.Geometry
    backend, dtype, packing = run
    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "heads": HEADS, "kv_heads": KV_HEADS, "head_dim_qk": HEAD_DIM, "head_dim_v": HEAD_DIM,
        "window": None, "softcap": None, "sinks": False, "dtype": dtype, "packing": packing,
        "dropout": 0.0, "sequence_len": SEQUENCE_LEN, "dense": True, "deterministic": False,
        "rows": ROWS, "autocast": False, "every_length": False,
    }  # fmt: skip
    known = inspect.signature(geometry_class).parameters
    geometry = geometry_class(**{name: value for name, value in values.items() if name in known})
    candidate = {
        "backend": backend, "geometries": [asdict(geometry)], "trusted": False, "routed": False
    }  # fmt: skip
    begun = time.process_time()
    proof = worker.prove_candidate(candidate, device="cpu", references={}, report=io.StringIO())
    assert proof.passed, proof.reasons
    print(round(time.process_time() - begun, 2))


if __name__ == "__main__":
    main()

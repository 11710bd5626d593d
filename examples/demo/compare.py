"""Print how much faster packing is: `python examples/demo/compare.py PACKED_FOLDER PADDED_FOLDER`.

Both folders are output_dir of runs of the same data, model and micro_batch_size; all figures come
from the files that the runs wrote.
"""

from __future__ import annotations

import json
import statistics
import sys
from itertools import pairwise
from pathlib import Path


def one_pass(folder: Path) -> tuple[int, float, float]:
    """Return the number of steps of one epoch, and their seconds.

    The time of a step is the median over the intervals between lines of metrics.jsonl; the first
    line is left out, because it includes the start of the run.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_second" in line]
    step_seconds = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(lines)
    ]
    steps = round(lines[-1]["step"] / lines[-1]["epoch"])
    filled = statistics.mean(line["filled"] for line in lines)
    return steps, steps * statistics.median(step_seconds), filled


def main(packed: str, padded: str) -> None:
    """Print the backend, its proof, and the time of an epoch with and without packing."""
    steps, seconds, filled = one_pass(Path(packed))
    padded_steps, padded_seconds, padded_filled = one_pass(Path(padded))
    receipt = json.loads((Path(packed) / "receipt.json").read_text())
    backend, because = receipt["attention"]["backend"], receipt["plan"]["because"]
    proof = next(proof for proof in receipt["proofs"] if not proof["reasons"])
    write = sys.stdout.write
    write(f"  attention  {backend}: {because}\n")
    write(f"  proof      {proof['backend']} passed {proof['cases']} probes on this machine\n")
    write(f"  packing    one pass over the data took {steps} steps and {seconds:.1f} s: ")
    write(f"{filled:.0%} of each batch is text\n")
    write(f"             padded, {padded_steps} steps and {padded_seconds:.1f} s: ")
    write(f"{padded_filled:.0%} is text, and the rest is padding\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])

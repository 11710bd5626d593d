"""Count right kernels that proofs refuse because of noise, and wrong ones that they find.

Right kernels are those of tests/fixtures/noisy_kernels, with 200 proofs of each kind of noise over
head sizes, query heads per key head, precisions, packing and tile sizes. Wrong ones are the same
with a leak, and every kernel of tests/unit/verification/test_wrong_kernels.py. Prints the rates,
and writes them to docs/measured/proof-noise.json. With names of parts it makes only those, and the
record keeps the others.

    python benchmarks/proof_noise.py [proofs of each kind] [right] [leaks] [wrong]
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/proof-noise.json"
sys.path[:0] = [str(ROOT / "tests/fixtures"), str(ROOT / "tests/unit/verification")]

# Tokens of the longest row. The noise matters in the isolation probe, which has its own length.
SEQUENCE_LEN = 64
PROOFS = 200
# Number of shapes on which each leak is tested, for each kernel.
LEAK_SHAPES = 4


def main() -> None:
    """Run all proofs, and write the record after each part."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    n_proofs = int(sys.argv[1]) if len(sys.argv) > 1 else PROOFS
    parts = {"right": _prove_right(n_proofs), "leaks": _prove_leaks(), "wrong": _prove_wrong()}
    chosen = sys.argv[2:] or [*parts]
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if sys.argv[2:] else {}
    record: dict[str, Any] = kept | {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, torch {torch.__version__}",
        "sequence_len": SEQUENCE_LEN,
        **settings(),
    }
    for part in chosen:
        for name, found in parts[part]:
            record[name] = found
            print(f"{name}: {json.dumps(found)}", flush=True)
            RECORD.parent.mkdir(parents=True, exist_ok=True)
            RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def settings() -> dict[str, Any]:
    """Return the names of kernels and settings, for the test that the record is up to date."""
    noisy, wrong = import_module("noisy_proofs"), import_module("test_wrong_kernels")
    return {
        "grid": {
            "head_dim": list(noisy.HEAD_DIMS),
            "heads_to_a_key_head": list(noisy.GROUPS),
            "dtype": list(noisy.DTYPES),
            "tile": list(noisy.TILES),
        },
        "kinds": {kind: list(families) for kind, families in noisy.KINDS.items()},
        "leaks": [*noisy.LEAKS, noisy.LOST_HEAD],
        "wrong_kernels": sorted({fault for _, fault, _, code in wrong.ALL if code}),
    }


def _prove_right(n_proofs: int) -> Iterator[tuple[str, Any]]:
    """Prove right kernels, n_proofs of each kind."""
    noisy = import_module("noisy_proofs")
    shapes = noisy.grid()
    random.Random(0).shuffle(shapes)
    found: dict[str, dict[str, Any]] = {
        kind: {
            "proofs": 0,
            "refused": 0,
            "seen_once": 0,
            "cpu_s": 0.0,
            "closest_to_its_bound": {},
            "reasons": [],
        }
        for kind in noisy.KINDS
    }
    for number in range(n_proofs):
        shape, references = shapes[number % len(shapes)], dict[Any, Any]()
        for kind, families in noisy.KINDS.items():
            family = families[(number + number // len(shapes)) % len(families)]
            begun = time.process_time()
            proof = noisy.prove_noisy(
                family, shape, references=references, sequence_len=SEQUENCE_LEN
            )
            counts = found[kind]
            counts["proofs"] += 1
            counts["refused"] += bool(proof.reasons)
            counts["seen_once"] += bool(proof.unrepeated)
            counts["cpu_s"] = round(counts["cpu_s"] + time.process_time() - begun, 1)
            closest = counts["closest_to_its_bound"]
            for figure in proof.figures:
                share = round(figure.error / figure.allowed, 3)
                closest[figure.quantity] = max(share, closest.get(figure.quantity, 0.0))
            counts["reasons"] += [f"{family} {shape}: {r.code}: {r.text}" for r in proof.reasons]
        if number % 10 == 9 or number == n_proofs - 1:
            yield "right", found


def _prove_leaks() -> Iterator[tuple[str, Any]]:
    """Prove noisy kernels with a leak."""
    noisy = import_module("noisy_proofs")
    shapes = [shape for shape in noisy.grid() if shape.packed and shape.group > 1]
    random.Random(1).shuffle(shapes)
    counts: dict[str, Any] = {"proofs": 0, "refused": 0, "missed": []}
    for shape in shapes[:LEAK_SHAPES]:
        references: dict[Any, Any] = {}
        for family in noisy.FAMILIES:
            for fault in (*noisy.LEAKS, noisy.LOST_HEAD):
                # First the probe that should find it; if it does not, all probes.
                for alone in (True, False):
                    proof = noisy.prove_noisy(
                        family,
                        shape,
                        references=references,
                        sequence_len=SEQUENCE_LEN,
                        fault=fault,
                        repeated_alone=alone,
                    )
                    if proof.reasons:
                        break
                counts["proofs"] += 1
                counts["refused"] += bool(proof.reasons)
                counts["missed"] += [] if proof.reasons else [f"{fault}: {family} {shape}"]
        yield "noisy_and_wrong", counts


def _prove_wrong() -> Iterator[tuple[str, Any]]:
    """Prove the wrong kernels of the tests as `verify` does, in a child process."""
    mutations = import_module("test_wrong_kernels")
    kernels = [
        (name, source, fault, geometry)
        for name, (source, fault, geometry, _) in zip(mutations.NAMES, mutations.ALL, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        proofs = import_module("served_kernels").prove_served(Path(folder), kernels)
    judged = list(zip(mutations.ALL, proofs, strict=True))
    wrong = [(fault, proof) for (_, fault, _, code), proof in judged if code]
    right = [proof for (_, _, _, code), proof in judged if not code]
    yield (
        "wrong",
        {
            "proofs": len(wrong),
            "refused": sum(not proof.passed for _, proof in wrong),
            "missed": [fault for fault, proof in wrong if proof.passed],
        },
    )
    refused = sum(not proof.passed for proof in right)
    yield "right_without_noise", {"proofs": len(right), "refused": refused}


if __name__ == "__main__":
    main()

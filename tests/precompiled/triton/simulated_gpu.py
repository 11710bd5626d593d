"""Look up every kernel of a set as a machine with the GPU would, and say what was found.

    python simulated_gpu.py SET.json DEVICE

TRITON_CACHE_DIR holds the copy. Batch and lengths are others than the build's. Nothing is to be
compiled: the first kernel that is not found ends the run. Prints JSON: the entries that were found.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "docker"))

from precompiled.triton.method import watch
from precompiled.triton.stand_in import without_gpu
from triton.backends.nvidia.compiler import CUDABackend

LENGTHS = [*range(2, 400, 23), 576, 640, 896, 1023, 1536, 2047, 3072]


def no_compiler(*arguments: Any) -> None:
    sys.exit("simulated_gpu: it would compile")


def main() -> None:
    asked, device = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    without_gpu(device)
    CUDABackend.make_ttir = CUDABackend.make_cubin = no_compiler
    entries = watch()
    program = importlib.import_module(asked["calls"])
    for lengths, batch in ((None, 1), (LENGTHS, 2)):
        for _, call in program.calls(asked, device, batch=batch, tokens=lengths):
            call()
    sys.stdout.write(json.dumps(sorted(entries)))


if __name__ == "__main__":
    main()

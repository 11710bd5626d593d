"""List the machine code in a file with NVIDIA's cuobjdump, to compare with fatbin.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

# cuobjdump needs a copy of the file; larger ones are torch's and NVIDIA's, and slow to copy.
_MAX_BYTES = 400 << 20


@cache
def cuobjdump() -> Path | None:
    """Return the path of nvidia-cuda-cuobjdump's program; None if that is not installed."""
    try:
        files = metadata.files("nvidia-cuda-cuobjdump") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == "cuobjdump"), None)


def list_codes(stream: BinaryIO, size: int) -> frozenset[str] | None:
    """Return machine code (sm_90a) and PTX (compute_90) in a file with NVIDIA's fat binaries.

    cuobjdump 13.5.37 leaves out the f of sm_100f, and names PTX by sm_ too.

    Args:
        stream: of the file; its position changes.
        size: its bytes.

    Returns:
        None: there is no cuobjdump, the file is too large for it, or it refuses the file, as it
            does some that strip(1) has rewritten ("Invalid ELF").
    """
    program = cuobjdump()
    if program is None or size > _MAX_BYTES:
        return None
    with tempfile.NamedTemporaryFile(suffix=".so") as copy:
        stream.seek(0)
        shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        found: set[str] = set()
        for option, name in (("-lelf", "sm"), ("-lptx", "compute")):
            command = [str(program), "-all", option, copy.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if "fatal" in done.stderr + done.stdout:
                return None
            found |= {
                f"{name}_{arch}" for arch in re.findall(r"\.sm_(\w+)\.(?:cubin|ptx)", done.stdout)
            }
    return frozenset(found) or None

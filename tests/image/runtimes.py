"""What tests of container runtimes share: a driver without a GPU, and a program that writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

# It prints what nvidia-smi prints for the query of attnimg/machine/probe.py.
NVIDIA_SMI = "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 9.0, 81559, 590.48.01'\n"
LIBCUDA = "int cuInit(unsigned flags) { return 100; } /* CUDA_ERROR_NO_DEVICE */\n"
# Where a driver that is found is recognized in doctor's output of attnimg:cpu.
SEEN = "NVIDIA H100 80GB HBM3 (sm_90)"

# Writes a file in each folder of a cache, HOME and the temporary folder; prints the folders.
WRITE = """
import json, os, pathlib, tempfile
names = ("HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH",
         "XDG_CACHE_HOME", "MPLCONFIGDIR", "HOME")
folders = {name: os.environ[name] for name in names if name in os.environ}
for folder in (*folders.values(), tempfile.gettempdir()):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
        file.write(b"x")
print(json.dumps(folders))
"""


def write_driver(folder: Path) -> Path:
    """Write bin/nvidia-smi and lib64/libcuda.so.1, as a driver's folder has them."""
    smi, library = folder / "bin" / "nvidia-smi", folder / "lib64" / "libcuda.so.1"
    for path in (smi, library):
        path.parent.mkdir(parents=True)
    folder.chmod(0o755)  # pytest's folders are for its own user
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)
    source = folder / "libcuda.c"
    source.write_text(LIBCUDA)
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True, capture_output=True)
    return folder

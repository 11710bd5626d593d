"""What tests of container runtimes share: a driver without a GPU, and a program that writes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

# A GPU for each image: what nvidia-smi prints for the query of attnimg/machine/probe.py. In the
# image `cpu` any would do.
GPUS = {
    "turing": "Tesla T4, 7.5, 15360, 590.48.01",
    "ampere": "NVIDIA A100-SXM4-80GB, 8.0, 81920, 590.48.01",
    "hopper": "NVIDIA H100 80GB HBM3, 9.0, 81559, 590.48.01",
    "blackwell": "NVIDIA B200, 10.0, 183359, 590.48.01",
}
LIBCUDA = "int cuInit(unsigned flags) { return 100; } /* CUDA_ERROR_NO_DEVICE */\n"

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


def image_for_the_gpu(image: str) -> str:
    """Return the image that is for the GPU of its driver here: its own name, or hopper for cpu."""
    command = ["docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image]
    labels = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    name = labels["org.opencontainers.image.title"].partition(":")[2]
    return name if name in GPUS else "hopper"


def seen(image: str) -> str:
    """Return where a driver that is found is recognized in doctor's output."""
    name, capability, *_ = GPUS[image_for_the_gpu(image)].split(", ")
    return f"{name} (sm_{capability.replace('.', '')})"


def write_driver(folder: Path, image: str) -> Path:
    """Write bin/nvidia-smi and lib64/libcuda.so.1, as a driver's folder has them."""
    smi, library = folder / "bin" / "nvidia-smi", folder / "lib64" / "libcuda.so.1"
    for path in (smi, library):
        path.parent.mkdir(parents=True)
    folder.chmod(0o755)  # pytest's folders are for its own user
    smi.write_text(f"#!/bin/sh\necho '{GPUS[image_for_the_gpu(image)]}'\n")
    smi.chmod(0o755)
    source = folder / "libcuda.c"
    source.write_text(LIBCUDA)
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True, capture_output=True)
    return folder

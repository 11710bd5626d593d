"""Measure the cpu image: its size on disk, its build, and the time to the first training step.

    python benchmarks/image.py [--cold]

Needs attnimg:cpu (`make build/cpu`); `make gate/cpu` measures its compressed size. --cold also
builds it without the cache of layers, with the base image and the cache of downloaded packages.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGE = "attnimg:cpu"
# What docker/Dockerfile.dockerignore includes, and what the build script reads.
SOURCES = ("attnimg", "docker", "requirements", "tests/image/inside", "build/torch-wheel")


def disk_bytes() -> int:
    """Return the image's unpacked size, as Docker counts it."""
    command = ["docker", "image", "inspect", "--format={{.Size}}", IMAGE]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def build_seconds(*, change: bool, no_cache: bool = False) -> float:
    """Build from a copy of the checkout, so that neither it nor attnimg:cpu changes.

    Args:
        change: add a line to attnimg/__init__.py first.
        no_cache: use no layer of an earlier build.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in SOURCES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, Path(folder) / name, ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if change:
            with (Path(folder) / "attnimg/__init__.py").open("a") as file:
                file.write(f"# {time.time()}\n")
        command = ["docker", "buildx", "bake", "-f", "docker/docker-bake.json", "cpu"]
        for setting in (
            "contexts.base=docker-image://attnimg-base:bookworm",
            f"contexts.torch-wheel=build/torch-wheel/{torch_version()}",
            "tags=attnimg-benchmark:cpu",
        ):
            command += ["--set", f"cpu.{setting}"]
        began = time.monotonic()
        subprocess.run(
            command + ["--no-cache"] * no_cache, cwd=folder, capture_output=True, check=True
        )
        return time.monotonic() - began


def torch_version() -> str:
    """Return the torch release of the image, by which its wheel's folder is named."""
    text = (ROOT / "docker/images/cpu/torch.json").read_text(encoding="utf-8")
    return str(json.loads(text)["version"])


def first_step_seconds() -> float:
    """Time `docker run IMAGE train demo.yaml`, with cold caches, up to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder) / "examples")
        program = ROOT / "examples" / "demo" / "prepare.py"
        demo = Path(folder) / "outputs" / "demo"
        subprocess.run([sys.executable, program, demo], capture_output=True, check=True)
        command = ["docker", "run", "--rm", "--network=none", "--user=0:0"]
        command += [f"--volume={folder}:/workspace", IMAGE, "train", "examples/demo/demo.yaml"]
        command += ["max_steps=2", "logging_steps=1", "eval_steps=null", "val_set_size=0"]
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        seconds = 0.0
        for line in process.stderr:
            if not seconds and line.lstrip().startswith("step"):
                seconds = time.monotonic() - began
        if process.wait() != 0 or not seconds:
            sys.exit("the run failed; run the docker command by hand")
        return seconds


def main() -> None:
    """Print every figure, one per line."""
    parser = argparse.ArgumentParser(description="Measure the cpu image.")
    parser.add_argument("--cold", action="store_true", help="also build it without a cache")
    cold = parser.parse_args().cold
    print(f"{IMAGE} on disk              {disk_bytes() / 1e6:,.0f} MB")
    if cold:
        seconds = build_seconds(change=False, no_cache=True)
        print(f"build without layer cache        {seconds:.0f} s")
    build_seconds(change=False)  # the next build has everything but the change in its cache
    print(f"build after a one-line change    {build_seconds(change=True):.0f} s; at most 60")
    print(f"docker run ... train, first step {first_step_seconds():.0f} s")


if __name__ == "__main__":
    main()

"""Compile for arm64 by a cross compiler and under qemu-user (`make bench/arm64-units`).

One source in CUDA and one in C++, of xFormers; for amd64 by its own compilers too. The compilers
are CUDA's wheels and Debian's g++, in containers of the base. The time is what they used of a CPU,
in seconds. Writes docs/measured/arm64.json.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile

from image import PLATFORM, ROOT, bases, merge_record, say

from recipes.read import read_recipes
from recipes.solve.lock import split_lock

PLACE_OF_UNITS = ROOT / "build/arm64-units"
LOCK = ROOT / "requirements/images"
PACKAGES = (
    "torch", "nvidia-cuda-runtime", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt",
    "nvidia-cuda-cccl", "nvidia-cublas", "nvidia-cusparse", "nvidia-cusolver",
)  # fmt: skip
SOURCES = ("sparse24/sparse24_apply.cu", "attention/attention.cpp")
# xFormers' setup.py: its options for nvcc and g++, for sm_90a.
SCRIPT = r"""
set -euo pipefail
headers=$1 cuda=$2 host=$3 file=$4
cd /units/xformers
include="-Ixformers/csrc -Ithird_party/cutlass/include -Ithird_party/cutlass/tools/util/include
  -Ithird_party/cutlass/examples -I$headers/torch/include
  -I$headers/torch/include/torch/csrc/api/include -I$cuda/include"
stable="-std=c++17 -DTORCH_STABLE_ONLY -DTORCH_TARGET_VERSION=0x020a000000000000"
TIMEFORMAT=%U
case $file in
*.cu) time "$cuda/bin/nvcc" $include --expt-relaxed-constexpr -Xcompiler -fPIC -DHAS_PYTORCH \
  --use_fast_math --extended-lambda -D_ENABLE_EXTENDED_ALIGNED_STORAGE $stable -DUSE_CUDA -DNDEBUG \
  -gencode=arch=compute_90a,code=sm_90a -ccbin "$host" -c "xformers/csrc/$file" -o /tmp/unit.o ;;
*) time "$host" -fPIC -O3 $include $stable -c "xformers/csrc/$file" -o /tmp/unit.o ;;
esac
"""
WAYS = {
    "native, for amd64": ("linux/amd64", "x86_64", "x86_64", "g++"),
    "cross, for arm64": ("linux/amd64", "aarch64", "x86_64", "aarch64-linux-gnu-g++"),
    "qemu-user, for arm64": (PLATFORM, "aarch64", "aarch64", "g++"),
}


def install(machine: str, suffix: str) -> None:
    """Install headers and compilers for a machine into a folder of its own, by the lock files."""
    locked: dict[str, str] = {}
    for name in ("toolchain", "torch"):
        text = (LOCK / f"{name}-2.14.1-cu130{suffix}.txt").read_text(encoding="utf-8")
        locked |= split_lock(text)
    wanted = PLACE_OF_UNITS / f"{machine}.txt"
    wanted.write_text("".join(locked[name] for name in PACKAGES), encoding="utf-8")
    folder = PLACE_OF_UNITS / machine
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-config", "--no-deps"]
    command += ["--require-hashes", "--target", str(folder), "-r", str(wanted)]
    command += ["--python-platform", f"{machine}-manylinux_2_36", "--python-version", "3.11"]
    subprocess.run(command, check=True)
    # Libraries are not linked here, and take most of the disk.
    for path in [*folder.glob("torch/lib"), *folder.glob("nvidia/cu13/lib")]:
        shutil.rmtree(path)


def fetch_source() -> None:
    """Download xFormers' sdist by its hash, and unpack it."""
    kernel = read_recipes(ROOT).kernels["xformers"]
    wanted = PLACE_OF_UNITS / "xformers.txt"
    wanted.write_text(f"{kernel.source} --hash=sha256:{kernel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:"]
    command += ["--require-hashes", "--no-build-isolation", f"--dest={PLACE_OF_UNITS}"]
    subprocess.run([*command, "-r", str(wanted)], check=True)
    with tarfile.open(next(PLACE_OF_UNITS.glob("xformers-*.tar.gz"))) as archive:
        archive.extractall(PLACE_OF_UNITS)  # its hash was verified
    next(PLACE_OF_UNITS.glob("xformers-*/")).rename(PLACE_OF_UNITS / "xformers")


def compare_units() -> dict[str, dict[str, float]]:
    """Return way -> source -> the CPU seconds of its compilers."""
    shutil.rmtree(PLACE_OF_UNITS, ignore_errors=True)
    PLACE_OF_UNITS.mkdir(parents=True)
    say("downloading compilers and headers for both processors into build/arm64-units: 3 GB")
    install("x86_64", "")
    install("aarch64", "-arm64")
    fetch_source()
    (PLACE_OF_UNITS / "unit.sh").write_text(SCRIPT, encoding="utf-8")
    images = {name: text.removeprefix("docker-image://") for name, text in bases().items()}
    found: dict[str, dict[str, float]] = {}
    for way, (where, target, host, compiler) in WAYS.items():
        image = images.get(f"base::{where}", images["base"])
        package = "g++-aarch64-linux-gnu" if compiler != "g++" else "g++"
        lines = ["apt-get update -q >/dev/null"]
        lines += [
            f"apt-get install -qy --no-install-recommends {package} libc6-dev >/dev/null 2>&1"
        ]
        for source in SOURCES:
            cuda = f"/units/{host}/nvidia/cu13"
            lines.append(f"bash /units/unit.sh /units/{target} {cuda} {compiler} {source}")
        command = ["docker", "run", "--rm", "--platform", where, "-v", f"{PLACE_OF_UNITS}:/units"]
        command += [image, "bash", "-ec", "\n".join(lines)]
        say(f"compiling {' and '.join(SOURCES)}: {way}")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times = re.findall(r"^(\d+\.\d+)$", done.stderr, re.MULTILINE)
        if done.returncode or len(times) != len(SOURCES):
            sys.exit(f"arm64: compiling failed: {way}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found[way] = {source: float(text) for source, text in zip(SOURCES, times, strict=True)}
        say(f"  CPU seconds: {found[way]}")
    shutil.rmtree(PLACE_OF_UNITS)
    return found


if __name__ == "__main__":
    merge_record("units", {"cpu_seconds": compare_units()})

"""Install the compiler that `make test/gates` needs: CUDA's from PyPI, 150 MB.

    python tests/gates/compiler.py FOLDER

Versions and hashes are those of the lock files of the toolchain.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from recipes.solve.lock import FOLDER, split_lock

ROOT = Path(__file__).parents[2]
LOCKS = ("toolchain-2.14.1-cu130.txt", "torch-2.14.1-cu130.txt")
NEEDED = (
    "nvidia-cuda-nvcc",
    "nvidia-nvvm",
    "nvidia-cuda-crt",
    "nvidia-cuda-cccl",
    "nvidia-cuda-runtime",
)


def main(folder: Path) -> None:
    """Install into a folder, and make what is a program there executable."""
    locked: dict[str, str] = {}
    for name in LOCKS:
        locked |= split_lock((ROOT / FOLDER / name).read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(locked[name] for name in NEEDED if name in locked), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
    into = ["--upgrade", "--require-hashes", "--target", str(folder), "-r", str(wanted)]
    subprocess.run([*pip, *into], check=True)
    for program in folder.glob("nvidia/cu13/**/bin/*"):
        program.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

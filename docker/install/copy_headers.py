"""Copy what compiling an extension needs, and the image lacks, from an unpruned environment.

    python copy_headers.py WHOLE

WHOLE has torch and the packages of the toolchain, nothing of it pruned. Copied are the files of
packages that the image does not have (ninja, nvcc, CUDA's headers), and what prune.py removed of
the others: headers, CMake files, the static parts of CUDA's runtime.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

SITE = Path("/opt/venv/lib/python3.11/site-packages")
PRUNED = (
    "torch/include/**/*",
    "torch/share/**/*",
    "nvidia/*/include/**/*",
    "nvidia/*/lib/libcudart_static.a",
    "nvidia/*/lib/libcudadevrt.a",
    "nvidia/*/lib/libcurand.so*",
)


def files_to_copy(whole: Path) -> Iterator[Path]:
    """Yield paths relative to site-packages, of programs as ../../../bin/NAME."""
    ours = {package.name for package in metadata.distributions(path=[str(SITE)])}
    for package in metadata.distributions(path=[str(whole)]):
        if package.name not in ours:
            yield from (Path(file) for file in package.files or ())
    for glob in PRUNED:
        yield from (path.relative_to(whole) for path in whole.glob(glob) if path.is_file())


def main(venv: Path) -> None:
    """Copy, without replacing a file; print the size."""
    whole, copied = venv / SITE.relative_to("/opt/venv"), 0
    for path in files_to_copy(whole):
        source, target = whole / path, SITE / path
        if source.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
            copied += target.stat().st_size
    print(f"copy_headers: {copied / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Compile one translation unit of flash-attn, with the flags and the compiler of the whole build.

    python -m kernel.compile_unit KERNEL.json UNIT

A whole flash-attn takes CPU-hours; one unit tells in minutes whether source, patches, compiler,
headers and torch fit together. KERNEL.json is flash-attn's, as build.py takes it; UNIT is a
file of csrc/flash_attn/src.
"""

from __future__ import annotations

import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from kernel import source
from torch.utils import cpp_extension


def main(build_file: Path, unit: str) -> None:
    """Fetch, patch, and let setup.py build an extension that has this one source."""
    extension = cpp_extension.CUDAExtension

    def of_one_unit(name: str, sources: list[str], **rest: Any) -> Any:
        return extension(name, [file for file in sources if file.endswith(f"/{unit}")], **rest)

    source.WORK.mkdir(parents=True)
    build = source.read_build(build_file)
    tree = source.prepare(build)
    os.environ.update(source.environment(build))
    cpp_extension.CUDAExtension = of_one_unit
    os.chdir(tree)
    sys.argv = ["setup.py", "build_ext", "--inplace"]
    began = time.monotonic()
    runpy.run_path("setup.py", run_name="__main__")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    library = next(tree.glob("flash_attn_2_cuda*.so"))
    print(
        f"unit: {unit} in {time.monotonic() - began:.0f} s, {spent.ru_utime:.0f} s of CPU, "
        f"at most {spent.ru_maxrss / 1e6:.1f} GB; {library.stat().st_size / 1e6:.1f} MB of library"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

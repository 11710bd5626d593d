"""Remove files from /opt/venv that an image never loads, and print the size of each removal.

    python prune.py ACCELERATOR

Run in the layer that installed the files: a later layer would hide them and save nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from elf import drop_needed, has_symbol_table

SITE = Path("/opt/venv/lib/python3.11/site-packages")
# Where the Dockerfile mounts a stage that has strip(1); no image needs it.
BINUTILS = Path("/binutils")

# (glob under site-packages, why no run reads it)
EVERY_IMAGE = (
    ("torch/include", "headers: kernels are compiled in the toolchain stage"),
    ("torch/share", "CMake files for the same"),
    ("torch/lib/*.a", "static libraries for the same"),
    ("torch/test", "tests of torch"),
    ("torch/bin/[!t]*", "protoc"),
    ("torch/bin/test_*", "test programs; torch_shm_manager, which data loaders start, stays"),
    ("torch/lib/libtorchbind_test.so", "a test's library"),
    ("torch/lib/libaoti_custom_ops.so", "a test's library"),
    ("torch/lib/libbackend_with_compiler.so", "a test's library"),
    ("torch/lib/libjitbackend_test.so", "a test's library"),
    ("**/tests", "tests of other packages"),
    ("numpy/**/lib/*.a", "static libraries for extensions in C"),
    ("pyarrow/libarrow*.so", "a copy of lib*.so.N for linking; wheels hold no links"),
    ("pyarrow/libarrow*.so.*.*.*", "another copy of it"),
    ("pyarrow/_flight.*.so", "Arrow over gRPC; pyarrow.flight says that it is not built in"),
    ("pyarrow/libarrow*_flight.so.*", "the same"),
    ("triton/instrumentation", "a plugin for triton's own tests"),
    ("test", "torchao's tests, which its wheel installs as a package of that name"),
    ("torchao/_C_mxfp8*.so", "for sm_100; the one image with torchao, hopper, is not"),
    ("pyarrow/include", "headers"),
    ("pyarrow/src", "C++ sources"),
)
# bitsandbytes picks one library by the device it finds; libbitsandbytes_cpu.so stays.
CPU_ONLY = (
    ("bitsandbytes/libbitsandbytes_cuda*.so", "needs libcudart"),
    ("bitsandbytes/libbitsandbytes_rocm*.so", "needs libamdhip64"),
    ("bitsandbytes/libbitsandbytes_xpu*.so", "needs libsycl"),
)
# What no run on a GPU loads, with CUDA 13.0 and torch 2.14.1 (2026-11-25).
CUDA_ONLY = (
    ("nvidia/*/lib/*.a", "static libraries"),
    ("nvidia/*/include", "headers: kernels are compiled in the toolchain stage"),
    ("nvidia/nvshmem/lib/*.bc", "device code to link NVSHMEM into kernels; torch loads the host's"),
    ("nvidia/nvshmem/lib/nvshmem_*.so*", "NVSHMEM's plugins for clusters; torch's NCCL does that"),
    ("nvidia/cu13/lib/libnvrtc*.alt.so*", "a second NVRTC, which nothing links"),
    ("nvidia/cu13/lib/libcusolverMg.so*", "cuSOLVER on several GPUs, which nothing links"),
    ("nvidia/cu13/lib/libcufile_rdma.so*", "GPUDirect Storage over InfiniBand; needs libmlx5"),
    ("nvidia/cu13/lib/libcufftw.so*", "FFTW's interface, which nothing links"),
    ("nvidia/cu13/lib/libnvblas.so*", "BLAS to preload, which nothing links"),
    ("nvidia/cu13/lib/libnvperf_*.so", "metrics of Nsight; CUPTI's activities work without"),
    ("nvidia/cu13/lib/libpcsamplingutil.so", "the same"),
    ("nvidia/cu13/lib/libcheckpoint.so", "the same"),
    ("nvidia/cu13/lib/libcurand.so*", "nobody calls it; and torch is told so first: UNNEEDED"),
    # libcudnn.so.9 opens it for its seven functions alone (9.24, read in its code). The rest stays:
    # the first cudnnBackendFinalize() opens all engines, RNNs and CTC losses open libcudnn_adv.
    ("nvidia/cudnn/lib/libcudnn_ext.so*", "causal convolutions, which torch does not call"),
    ("triton/backends/nvidia/lib/cupti*", "triton.profiler, which no run starts"),
    ("triton/_C/libproton.so", "the same"),
    ("triton/plugins", "examples of plugins, which ask for a libtriton that their folder lacks"),
    (
        "triton/backends/amd/lib",
        "device code for another vendor; the .py files stay, triton imports them",
    ),
    ("triton/backends/amd/include", "the same"),
    ("triton/backends/nvidia/bin/cuobjdump", "for triton.tools.disasm, which no run calls"),
    ("triton/backends/nvidia/bin/nvdisasm", "the same"),
    ("nvidia_cutlass_dsl/cu12", "CuTe DSL for CUDA 12"),
    ("nvidia_cutlass_dsl/**/_mlir_libs/*.cu12.*", "the same: its compiler, 192 MB"),
    ("nvidia_cutlass_dsl/cu13/lib/*.a", "static libraries"),
    ("nvidia_cutlass_dsl/cu13/lib/stubs", "stubs for other processors"),
    ("torch_c_dlpack_ext/libtorch_c_dlpack_addon_torch2[4-9]-*.so", "for torch 2.4 to 2.9"),
    ("bitsandbytes/libbitsandbytes_cuda1[12]*.so", "for CUDA 11 and 12"),
    ("bitsandbytes/libbitsandbytes_rocm*.so", "needs libamdhip64"),
    ("bitsandbytes/libbitsandbytes_xpu*.so", "needs libsycl"),
)
# (glob, library, why it can do without). The gate `symbols` finds what a later torch would miss.
UNNEEDED = (
    (
        "torch/lib/libtorch_cuda.so",
        "libcurand.so",
        "linked, and none of its functions called: torch has its own Philox",
    ),
)
# Their symbol tables serve debuggers alone. Not *.libs/: auditwheel laid those out again, and
# strip breaks their alignment.
STRIP = (
    "torch/lib/lib*.so",
    "pyarrow/*.so*",
    "triton/_C/libtriton.so",
    "nvidia/*/lib/lib*.so*",
    "nvidia_cutlass_dsl/**/*.so",
)


def size_bytes(path: Path) -> int:
    """Return the bytes of a file or a folder."""
    if path.is_symlink() or path.is_file():
        return path.lstat().st_size
    return sum(
        size_bytes(Path(folder) / name) for folder, _, names in os.walk(path) for name in names
    )


def remove(glob: str) -> int:
    """Remove the matching files; return the bytes saved."""
    saved = 0
    for path in sorted(SITE.glob(glob)):
        saved += size_bytes(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return saved


def strip(glob: str) -> int:
    """Strip symbol tables from the matching files; return the bytes saved.

    A file that has none, or would not shrink, is not changed: rewriting one of an earlier layer
    would store it twice.
    """
    saved = 0
    env = {"LD_LIBRARY_PATH": str(BINUTILS / "lib/x86_64-linux-gnu")}
    for path in filter(has_symbol_table, sorted(SITE.glob(glob))):
        stripped = path.with_name(path.name + ".stripped")
        command = [str(BINUTILS / "bin/strip"), "--strip-unneeded", "-o", str(stripped), str(path)]
        subprocess.run(command, env=env, check=True)
        if stripped.stat().st_size < path.stat().st_size:
            saved += path.stat().st_size - stripped.stat().st_size
            stripped.replace(path)
        stripped.unlink(missing_ok=True)
    return saved


def main(accelerator: str) -> None:
    """Remove needed libraries and files, strip the rest; print a line for each change."""
    for glob, library, why in UNNEEDED if accelerator == "cuda" else ():
        for path in sorted(SITE.glob(glob)):
            for name in drop_needed(path, library):
                print(f"unlink: {name} from {glob}: {why}")
    removals = EVERY_IMAGE + {"cpu": CPU_ONLY, "cuda": CUDA_ONLY}.get(accelerator, ())
    for glob, why in removals:
        if saved := remove(glob):
            print(f"prune: {saved / 1e6:7.1f} MB  {glob}: {why}")
    for glob in STRIP:
        if saved := strip(glob):
            print(f"strip: {saved / 1e6:7.1f} MB  {glob}")


if __name__ == "__main__":
    main(sys.argv[1])

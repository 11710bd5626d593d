"""Simulate an NVIDIA GPU and its driver where there is none, for Triton and SageAttention.

Triton compiles for the GPU that its driver names, so the rest of a launch is Triton's own code: how
it specializes the arguments, names the entry, finds or compiles it. Tensors are on the CPU, and
their addresses are aligned as torch aligns those on a GPU.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Shared memory of one block, in bytes: Triton refuses a kernel that needs more; no entry depends on
# it. Source: SMEM_CAPACITY_MAP in cutlass_dsl/cutlass.py of nvidia-cutlass-dsl 4.8.1 (2026-11-25).
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376, 121: 101376}


class Driver:
    """A driver for Triton that answers as on a GPU of an architecture; launches do nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launcher_cls = lambda src, metadata: lambda *arguments: None
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[arch]},
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def without_gpu(device: str) -> None:
    """Simulate a GPU of a name such as sm_90 in this process, for Triton and for torch."""
    simulate_in_torch(device)
    driver.set_active(Driver(int(device.removeprefix("sm_"))))


def simulate_in_torch(device: str) -> None:
    """Replace the functions by which SageAttention and Triton ask torch about the GPU."""
    digits = device.removeprefix("sm_")
    capability = (int(digits[:-1]), int(digits[-1]))
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.is_available = lambda: True
    torch.cuda.set_device = lambda device: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: capability


class Extension:
    """A module of CUDA functions, each of which does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def sage_without_cuda(device: str) -> None:
    """Replace SageAttention's CUDA extensions, so that only its Python and Triton code runs."""
    from sageattention import core, quant

    # The key is the index of a tensor's device, which is None for the CPU.
    core.get_cuda_arch_versions = lambda: {None: device.replace("_", "")}
    for name in ("sm80", "sm89", "sm90"):
        setattr(core, f"{name}_compile", Extension())
        setattr(core, f"{name.upper()}_ENABLED", True)
    quant._fused = Extension()

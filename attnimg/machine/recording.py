"""From the raw answers of a machine's drivers to a Machine: text in, facts out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from attnimg.errors import AttnimgError
from attnimg.facts import Arch, LocalKernel, Machine
from attnimg.select.gpus import arch_from_name

# Memory banks of a GPU that hold its own memory (public and private frame buffer).
# Source: HSA_MEM_HEAP_TYPE_FB_PUBLIC and _FB_PRIVATE in include/uapi/linux/kfd_sysfs.h,
# torvalds/linux 512a93a (read 2026-11-21).
_FRAME_BUFFER_HEAPS = frozenset({1, 2})


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a program said and how it ended."""

    returncode: int
    stdout: str
    stderr: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Everything that decides what a machine is, as text that can be kept in a file.

    Attributes:
        nvidia_smi: the answer to --query-gpu=name,compute_cap,memory.total,driver_version
            --format=csv,noheader,nounits; None without the program.
        kfd_nodes: `properties` of each node of amdgpu's topology, its memory banks' appended.
        amd_driver: version of the amdgpu module.
        memory_bytes: of the host.
        cuda_visible_devices: the environment variable; None when it is not set.
        hip_visible_devices: the same for AMD.
    """

    nvidia_smi: Answer | None = None
    kfd_nodes: tuple[str, ...] = ()
    amd_driver: str | None = None
    memory_bytes: int | None = None
    cuda_visible_devices: str | None = None
    hip_visible_devices: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Device:
    arch: Arch
    gpu: str
    memory_bytes: int | None
    driver: str | None


def describe(
    recording: Recording,
    *,
    packages: Mapping[str, str] | None = None,
    torch: str | None = None,
    local_kernels: tuple[LocalKernel, ...] = (),
) -> Machine:
    """Tell what machine gave these answers. The first visible device counts."""
    nvidia, problem = _nvidia_devices(recording.nvidia_smi)
    visible = _visible(nvidia, recording.cuda_visible_devices)
    if not nvidia:
        mask = recording.hip_visible_devices
        mask = recording.cuda_visible_devices if mask is None else mask
        visible = _visible(_amd_devices(recording), mask)
    host = _Device(
        arch=arch_from_name("cpu"), gpu="cpu", memory_bytes=recording.memory_bytes, driver=None
    )
    first, *others = visible or [host]
    differing = {device.arch.name: None for device in others if device.arch != first.arch}
    return Machine(
        arch=first.arch,
        gpu=first.gpu,
        memory_bytes=first.memory_bytes,
        driver=first.driver,
        packages=packages,
        torch=torch,
        local_kernels=local_kernels,
        other_archs=tuple(differing),
        driver_problem=problem,
    )


def _nvidia_devices(answer: Answer | None) -> tuple[list[_Device], str | None]:
    """Read one device a line, and keep whatever else the driver said."""
    if answer is None:
        return [], None
    devices, complaints = [], []
    for line in (answer.stdout + "\n" + answer.stderr).splitlines():
        fields = [field.strip() for field in line.rsplit(",", 3)]
        if len(fields) == 4 and (sm := re.fullmatch(r"([1-9][0-9]?)\.([0-9])", fields[1])):
            mebibytes = fields[2]  # "[N/A]" where memory is shared with the host, as on DGX Spark
            devices.append(
                _Device(
                    arch=arch_from_name(f"sm_{sm[1]}{sm[2]}"),
                    gpu=fields[0],
                    memory_bytes=int(mebibytes) * 2**20 if mebibytes.isdecimal() else None,
                    driver=fields[3],
                )
            )
        elif line.strip():
            complaints.append(line.strip())
    if answer.returncode and not complaints:
        complaints.append(f"nvidia-smi ended with status {answer.returncode} and said nothing")
    return devices, " ".join(complaints) or None


def _amd_devices(recording: Recording) -> list[_Device]:
    devices = []
    for node in recording.kfd_nodes:
        pairs = [line.split() for line in node.splitlines()]
        version = next((v for k, v in _numbers(pairs) if k == "gfx_target_version"), 0)
        if not version:  # a CPU's node
            continue
        # 90402 is major 9, minor 4, stepping 2: gfx942; the last two are hexadecimal digits.
        name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        try:
            arch = arch_from_name(name)
        except AttnimgError:  # not the shape of any architecture we could plan for
            continue
        devices.append(
            _Device(
                arch=arch,
                gpu=f"AMD {name}",
                memory_bytes=_frame_buffer_bytes(pairs),
                driver=recording.amd_driver,
            )
        )
    return devices


def _frame_buffer_bytes(pairs: Sequence[list[str]]) -> int | None:
    total, heap = 0, 0
    for key, value in _numbers(pairs):
        if key == "heap_type":
            heap = value
        elif key == "size_in_bytes" and heap in _FRAME_BUFFER_HEAPS:
            total += value
    return total or None


def _numbers(pairs: Sequence[list[str]]) -> list[tuple[str, int]]:
    return [(pair[0], int(pair[1])) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()]


def _visible(devices: list[_Device], mask: str | None) -> list[_Device]:
    """Apply CUDA_VISIBLE_DEVICES: a list of indices that ends at the first invalid one.

    Source: https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    (read 2026-11-21). Devices named by UUID can't be told apart here, so all of them stay.
    """
    if mask is None:
        return devices
    chosen: list[_Device] = []
    for token in mask.split(","):
        entry = token.strip()
        if entry.startswith(("GPU-", "MIG-")):
            return devices
        if not entry.isdecimal() or int(entry) >= len(devices):
            break
        chosen.append(devices[int(entry)])
    return chosen

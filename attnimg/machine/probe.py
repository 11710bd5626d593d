"""Detect this machine: its GPU, driver, memory, installed packages and local kernels.

A Recording has the raw output of the drivers as text, and `describe` is a pure function of it, so
that tests can use recorded output of other machines.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from attnimg.backends import kernel_variables
from attnimg.cgroup import memory_limit
from attnimg.distributions import distribution, version
from attnimg.errors import AttnimgError
from attnimg.facts import LocalKernel, Machine
from attnimg.machine.container import find_driver_program
from attnimg.selection.gpus_and_images import arch_from_name

_QUERY = "name,compute_cap,memory.total,driver_version"
# nvidia-smi normally takes less than a second; without persistence mode it takes a few seconds to
# initialize eight GPUs.
_NVIDIA_SMI_SECONDS = 20.0
# Heap types of a GPU's own memory (public and private frame buffer).
# Source: HSA_MEM_HEAP_TYPE_FB_PUBLIC and _FB_PRIVATE in include/uapi/linux/kfd_sysfs.h,
# torvalds/linux 512a93a (read 2026-11-21).
_FRAME_BUFFER_HEAPS = frozenset({1, 2})
# (package, package that may overwrite it, a file that both contain). flash-attn 2.8.3 has 20 files
# of an old FlashAttention-4 in flash_attn/cute/, the folder of flash-attn-4; the package that is
# installed last overwrites the other's files. With the old files, importing FlashAttention-4 raises
# AttributeError. Seen with pip 26.3 (2026-11-21).
_CLAIMED_TWICE = (("flash-attn-4", "flash-attn", "flash_attn/cute/interface.py"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandResult:
    """The output and the exit status of a program."""

    returncode: int
    stdout: str
    stderr: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """The raw data that a Machine is computed from, as text that can be stored in a file.

    Attributes:
        nvidia_smi: the output for --query-gpu=name,compute_cap,memory.total,driver_version
            --format=csv,noheader,nounits; None without the program.
        kfd_nodes: `properties` of each node of amdgpu's topology, then those of its memory banks.
        amd_driver: version of the amdgpu module.
        memory_bytes: of the host, or the limit of the container or job.
        cuda_visible_devices: the environment variable; None when it is not set.
        hip_visible_devices: the same for AMD.
    """

    nvidia_smi: CommandResult | None = None
    kfd_nodes: tuple[str, ...] = ()
    amd_driver: str | None = None
    memory_bytes: int | None = None
    cuda_visible_devices: str | None = None
    hip_visible_devices: str | None = None


def this_machine(packages: Iterable[str], *, sys_root: Path = Path("/sys")) -> Machine:
    """Detect this machine, without importing torch.

    Args:
        packages: distribution names to look for, in any spelling; "torch" is always looked for.
        sys_root: the path of /sys.

    Raises:
        AttnimgError: LOCAL_KERNELS is malformed, or a folder in it has no kernel.
    """
    recording = Recording(
        nvidia_smi=_run_nvidia_smi(),
        kfd_nodes=_read_kfd(sys_root),
        amd_driver=_text(sys_root / "module" / "amdgpu" / "version"),
        memory_bytes=min(
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit() or sys.maxsize
        ),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        hip_visible_devices=os.environ.get("HIP_VISIBLE_DEVICES"),
    )
    installed = _versions({canonical(name) for name in packages} | {"torch"})
    torch = installed.get("torch")
    local: tuple[LocalKernel, ...] = ()
    if (spec := os.environ.get("LOCAL_KERNELS")) is not None:
        from attnimg.machine.local_kernels import read_local_kernels  # 8 ms, rarely needed

        local = read_local_kernels(spec, torch=torch)
    return replace(
        describe(recording),
        packages=installed,
        torch=torch,
        local_kernels=local,
        shadowed=find_shadowed(installed),
        variables=kernel_variables(os.environ) | _requested_backend(os.environ),
    )


def _requested_backend(environment: Mapping[str, str]) -> dict[str, str]:
    """Return ATTNIMG_BACKEND, where it is set and not empty."""
    name = environment.get("ATTNIMG_BACKEND", "").strip()
    return {"ATTNIMG_BACKEND": name} if name else {}


def describe(recording: Recording) -> Machine:
    """Return the machine of a recording, without its packages.

    Its architecture is that of the first visible device.
    """
    nvidia, problem = _nvidia_devices(recording.nvidia_smi)
    visible = _visible(nvidia, recording.cuda_visible_devices)
    if not nvidia:
        mask = recording.hip_visible_devices
        mask = recording.cuda_visible_devices if mask is None else mask
        visible = _visible(_amd_devices(recording), mask)
    cpu = Machine(arch=arch_from_name("cpu"), gpu="cpu", memory_bytes=recording.memory_bytes)
    first, *others = visible or [cpu]
    differing = dict.fromkeys(other.arch.name for other in others if other.arch != first.arch)
    return replace(first, other_archs=tuple(differing), driver_problem=problem)


def find_shadowed(installed: Collection[str]) -> tuple[str, ...]:
    """Return the packages whose files another package has overwritten, without importing any.

    Args:
        installed: names of installed distributions.
    """
    return tuple(
        package
        for package, other, path in _CLAIMED_TWICE
        if {package, other} <= set(installed)
        and changed_files(found := distribution(package), read_record(found, under=path))
    )


def canonical(name: str) -> str:
    """Return the normalized name of a distribution (PEP 503).

    packaging.utils has the same function, but takes 10 ms to import.
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def read_record(dist: metadata.Distribution, *, under: str = "") -> list[str]:
    """Return the lines of RECORD as text, as parsing 80 such files as csv takes a second.

    Args:
        dist: an installed distribution.
        under: the prefix of the lines to return.
    """
    lines = (dist.read_text("RECORD") or "").splitlines()
    return [line for line in lines if line.startswith(under)]


def changed_files(dist: metadata.Distribution, record: Iterable[str]) -> tuple[str, ...]:
    """Return missing files, and Python files whose hash differs from the one in RECORD.

    Libraries are not hashed: with hundreds of megabytes that would take seconds.

    Args:
        dist: an installed distribution.
        record: lines of its RECORD.
    """
    found = []
    for line in record:
        name, _, rest = line.rpartition(",")[0].rpartition(",")
        algorithm, _, wanted = rest.partition("=")
        path = Path(str(dist.locate_file(name)))
        if not algorithm or name.endswith(".pyc"):
            continue
        if not path.is_file():
            found.append(name)
        elif path.suffix == ".py":
            digest = hashlib.new(algorithm, path.read_bytes()).digest()
            if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != wanted:
                found.append(name)
    return tuple(found)


def _run_nvidia_smi() -> CommandResult | None:
    """Run nvidia-smi; return None when there is none."""
    program = find_driver_program("nvidia-smi")
    if program is None:
        return None
    import subprocess  # takes 3 ms, and is not needed without a GPU

    command = [program, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_NVIDIA_SMI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        text = f"nvidia-smi did not answer within {_NVIDIA_SMI_SECONDS:.0f} s"
        return CommandResult(returncode=124, stdout="", stderr=text)
    except OSError as error:
        return CommandResult(returncode=126, stdout="", stderr=f"nvidia-smi does not run: {error}")
    return CommandResult(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


def _read_kfd(sys_root: Path) -> tuple[str, ...]:
    """Read the properties of each node of amdgpu's compute driver, and of its memory banks."""
    nodes = sys_root / "class" / "kfd" / "kfd" / "topology" / "nodes"
    texts = []
    # The devices have the numeric order of their nodes.
    for node in sorted(nodes.glob("[0-9]*"), key=lambda path: (len(path.name), path.name)):
        banks = sorted(node.glob("mem_banks/*/properties"))
        texts.append("\n".join(_text(path) or "" for path in [node / "properties", *banks]))
    return tuple(texts)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        # A container may be able to list a node but not to read it: it can't use that GPU.
        return None


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        with suppress(metadata.PackageNotFoundError):
            found[name] = version(name)
    return found


def _nvidia_devices(answer: CommandResult | None) -> tuple[list[Machine], str | None]:
    """Return a machine for each line that describes a device, and the other lines as an error."""
    if answer is None:
        return [], None
    devices, complaints = [], []
    for line in (answer.stdout + "\n" + answer.stderr).splitlines():
        fields = [field.strip() for field in line.rsplit(",", 3)]
        if len(fields) == 4 and (sm := re.fullmatch(r"([1-9][0-9]?)\.([0-9])", fields[1])):
            name, _, mebibytes, driver = fields
            # "[N/A]" where memory is shared with the host, as on DGX Spark
            memory = int(mebibytes) * 2**20 if mebibytes.isdecimal() else None
            arch = arch_from_name(f"sm_{sm[1]}{sm[2]}")
            devices.append(Machine(arch=arch, gpu=name, memory_bytes=memory, driver=driver))
        elif line.strip():
            complaints.append(line.strip())
    if answer.returncode and not complaints:
        complaints.append(f"nvidia-smi ended with status {answer.returncode} without a message")
    return devices, " ".join(complaints) or None


def _amd_devices(recording: Recording) -> list[Machine]:
    devices = []
    for node in recording.kfd_nodes:
        pairs = [line.split() for line in node.splitlines()]
        numbers = [(p[0], int(p[1])) for p in pairs if len(p) == 2 and p[1].isdecimal()]
        version = dict(numbers).get("gfx_target_version", 0)
        if not version:  # a CPU's node
            continue
        # 90402 is major 9, minor 4, stepping 2: gfx942; the last two are hexadecimal digits.
        name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
        try:
            arch = arch_from_name(name)
        except AttnimgError:  # not the name of a known kind of architecture
            continue
        memory, driver = _frame_buffer_bytes(numbers), recording.amd_driver
        devices.append(Machine(arch=arch, gpu=f"AMD {name}", memory_bytes=memory, driver=driver))
    return devices


def _frame_buffer_bytes(numbers: Iterable[tuple[str, int]]) -> int | None:
    total, heap = 0, 0
    for key, value in numbers:
        if key == "heap_type":
            heap = value
        elif key == "size_in_bytes" and heap in _FRAME_BUFFER_HEAPS:
            total += value
    return total or None


def _visible(devices: list[Machine], mask: str | None) -> list[Machine]:
    """Return the devices in CUDA_VISIBLE_DEVICES, a list of indices up to the first invalid one.

    Source: https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    (read 2026-11-21). UUIDs of devices are not known here, so a list of UUIDs selects all devices.
    """
    if mask is None:
        return devices
    chosen: list[Machine] = []
    for token in mask.split(","):
        entry = token.strip()
        if entry.startswith(("GPU-", "MIG-")):
            return devices
        if not entry.isdecimal() or int(entry) >= len(devices):
            break
        chosen.append(devices[int(entry)])
    return chosen

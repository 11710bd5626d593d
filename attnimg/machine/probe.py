"""What this machine is: its GPU, driver, memory, installed packages and local kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from attnimg.backends import variables_that_choose
from attnimg.facts import LocalKernel, Machine
from attnimg.machine.recording import Answer, Recording, describe
from attnimg.machine.shadowed import shadowed

__all__ = ["this_machine"]

_QUERY = "name,compute_cap,memory.total,driver_version"
# A healthy driver answers in well under a second; one without persistence mode takes a few to
# wake eight GPUs up.
_NVIDIA_SMI_SECONDS = 20.0


def this_machine(packages: Iterable[str], *, sys_root: Path = Path("/sys")) -> Machine:
    """Look at this machine without importing torch.

    Args:
        packages: distribution names to ask for, in any spelling; "torch" is always asked for.
        sys_root: where the kernel's /sys is.

    Raises:
        AttnimgError: LOCAL_KERNELS is malformed or names a folder that serves nothing.
    """
    recording = Recording(
        nvidia_smi=_ask_nvidia_smi(),
        kfd_nodes=_read_kfd(sys_root),
        amd_driver=_text(sys_root / "module" / "amdgpu" / "version"),
        memory_bytes=_memory_bytes(),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        hip_visible_devices=os.environ.get("HIP_VISIBLE_DEVICES"),
    )
    installed = _versions({_normalised(name) for name in packages} | {"torch"})
    torch = installed.get("torch")
    machine = describe(
        recording,
        packages=installed,
        torch=torch,
        local_kernels=_local_kernels(os.environ.get("LOCAL_KERNELS"), torch=torch),
    )
    variables = variables_that_choose(os.environ)
    return replace(machine, shadowed=shadowed(installed), variables=variables)


def _local_kernels(spec: str | None, *, torch: str | None) -> tuple[LocalKernel, ...]:
    if spec is None:
        return ()
    from attnimg.machine.local_kernels import read_local_kernels  # 8 ms that most runs don't need

    return read_local_kernels(spec, torch=torch)


def _ask_nvidia_smi() -> Answer | None:
    """Run nvidia-smi; None when it is not on PATH."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    import subprocess  # 3 ms that a machine without a GPU doesn't need

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
        return Answer(returncode=124, stdout="", stderr=text)
    except OSError as error:
        return Answer(returncode=126, stdout="", stderr=f"nvidia-smi does not run: {error}")
    return Answer(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)


def _read_kfd(sys_root: Path) -> tuple[str, ...]:
    """Read what amdgpu's compute driver says of each node, its memory banks appended."""
    nodes = sys_root / "class" / "kfd" / "kfd" / "topology" / "nodes"
    texts = []
    # Numeric order: it is the order of the devices.
    for node in sorted(nodes.glob("[0-9]*"), key=lambda path: (len(path.name), path.name)):
        banks = sorted(node.glob("mem_banks/*/properties"))
        texts.append("\n".join(_text(path) or "" for path in [node / "properties", *banks]))
    return tuple(texts)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        # A container may be allowed to list a node and not to read it; that is no AMD GPU for us.
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # these names are not everywhere
        return None


def _normalised(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _versions(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found[name] = version
    return found

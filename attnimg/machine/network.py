"""Check whether NCCL can connect several nodes by RDMA from here, or only by TCP.

NCCL loads libibverbs at run time (and libmlx5, for adapters of NVIDIA). Without the library, it
connects over TCP and prints no warning.
Source: NVIDIA/nccl, src/misc/ibvsymbols.cc and mlx5dvsymbols.cc (2026-11-27).
"""

from __future__ import annotations

import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnimg.machine.container import LIBRARY_FOLDERS

_VERBS = "libibverbs.so.1"
# RDMA registers memory that must not be swapped, so it fails under a small limit of locked memory.
# NVIDIA recommends --ulimit memlock=-1 for its containers; this threshold is our choice.
_LOCKED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Rdma:
    """The RDMA adapters of this machine, and what a process needs to use them.

    Attributes:
        adapters: name, such as mlx5_0 -> the kernel's driver of it, such as mlx5_core.
        device_files: whether the adapters' device files can be opened here.
        library: whether libibverbs is installed.
        locked_bytes: how much memory this process may lock; None without a limit.
    """

    adapters: Mapping[str, str]
    device_files: bool
    library: bool
    locked_bytes: int | None


def read_rdma(root: Path = Path("/")) -> Rdma:
    """Read the adapters of this machine.

    Args:
        root: the folder with sys, dev and usr in it.
    """
    found = sorted((root / "sys/class/infiniband").glob("*"))
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Rdma(
        adapters={path.name: _driver(path) for path in found},
        device_files=_any(root, ["dev/infiniband"], "uverbs*"),
        library=_any(root, LIBRARY_FOLDERS, _VERBS),
        locked_bytes=None if limit == resource.RLIM_INFINITY else limit,
    )


def judge_rdma(rdma: Rdma) -> tuple[Literal["ok", "warn"], str, str]:
    """Return the result of a check: its status, what was found, and what to do.

    It is at most a warning, since runs on one machine need no RDMA.
    """
    names = ", ".join(rdma.adapters)
    if not rdma.adapters:
        return "ok", "no RDMA adapter; NCCL connects several machines over TCP", ""
    if set(rdma.adapters.values()) == {"efa"}:
        what = (
            f"{names}: for EFA, NCCL needs libfabric and aws-ofi-nccl, which attnimg's images do "
            "not have: runs on several machines use TCP"
        )
        return "warn", what, "install AWS's EFA software in a child image, before such runs"
    missing = []
    do = []
    if not rdma.library:
        missing.append(f"no {_VERBS}")
        do.append("apt-get install libibverbs1 ibverbs-providers, as attnimg's GPU images have")
    options = []
    if not rdma.device_files:
        missing.append("no /dev/infiniband")
        options.append("--device /dev/infiniband")
    if rdma.locked_bytes is not None and rdma.locked_bytes < _LOCKED_BYTES:
        missing.append(f"at most {rdma.locked_bytes >> 10:,} KiB of locked memory")
        options.append("--ulimit memlock=-1")
    if options:
        do.append(f"start the container with {' '.join(options)} --network host")
    if not missing:
        return "ok", f"{names}: NCCL can connect several machines by RDMA", ""
    what = f"{names}: NCCL can't use RDMA, and connects several machines over TCP: found "
    return "warn", what + ", ".join(missing), "for runs on several machines, " + "; ".join(do)


def _driver(adapter: Path) -> str:
    """Return the name of the kernel's driver; empty where it can't be read."""
    try:
        return (adapter / "device" / "driver").resolve(strict=True).name
    except OSError:
        return ""


def _any(root: Path, folders: Iterable[str], pattern: str) -> bool:
    return any(True for folder in folders for _ in (root / folder).glob(pattern))

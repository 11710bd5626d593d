"""Read the memory limit of this process's control group, and how often the kernel killed for it.

A container, a Slurm job and a systemd unit have a control group each. Version 1 has a hierarchy
for memory alone, version 2 one for everything; a limit may be set at any level above the process.
Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst, torvalds/linux
(2026-11-27).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Version 1 has the largest multiple of a page below 2**63 where no limit is set.
_NO_LIMIT = 1 << 60


def memory_limit(*, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process and others of its group may use; None without a limit."""
    limits = []
    for folder in _folders(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # "max" without a limit
                limits.append(int((folder / name).read_text(encoding="ascii")))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def oom_kills(*, root: Path = Path("/")) -> int:
    """Return how many processes of the group the kernel has killed because its memory was full."""
    for folder in _folders(root):
        for name in ("memory.events", "memory.oom_control"):
            with suppress(OSError, ValueError):
                lines = (folder / name).read_text(encoding="ascii").splitlines()
                counts = dict(line.split() for line in lines)
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
    return 0


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders of the process's group and of the groups above it, the nearest first.

    A container may see its own group as the top of the hierarchy, although /proc/self/cgroup has
    the path on the host; then only the top exists.
    """
    top = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number != "0" and "memory" not in controllers.split(","):
            continue
        hierarchy = top / "memory" if number != "0" else top
        group = hierarchy / path.strip("/")
        while group.is_relative_to(hierarchy):
            yield group
            group = group.parent

"""Read the limits of this process's control groups: memory, and a quota of CPU time.

A container, a Slurm job and a systemd unit have a control group each. Version 1 has a hierarchy for
each controller (memory, cpu), version 2 one for all; both may be mounted. A limit may be set at any
level above the process, and the smallest counts.
Source: Linux's cgroup-v1/memory.rst, cgroup-v2.rst, scheduler/sched-bwc.rst (read 2026-11-27).

psutil and Python do not read control groups; joblib's loky reads the container's own, but not those
above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

# Version 1 has the largest multiple of a page below 2**63 where no limit is set.
_NO_LIMIT = 1 << 60

_MEMORY_LIMIT = {1: "memory.limit_in_bytes", 2: "memory.max"}
_MEMORY_COUNTS = {1: "memory.oom_control", 2: "memory.events"}

_Controller = Literal["cpu", "memory"]


class _Group(NamedTuple):
    """A control group that limits this process.

    Attributes:
        version: 1 or 2.
        folder: with the group's files.
    """

    version: int
    folder: Path


def memory_limit(*, root: Path = Path("/")) -> int | None:
    """Return the bytes that this process and others of its group may use; None without a limit."""
    limits = []
    for group in _groups("memory", root):
        with suppress(OSError, ValueError):  # "max" without a limit
            limits.append(int(_read(group, _MEMORY_LIMIT[group.version])))
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def oom_kills(*, root: Path = Path("/")) -> int:
    """Return how many processes of the group the kernel has killed because its memory was full."""
    for group in _groups("memory", root):
        with suppress(OSError, ValueError):
            lines = _read(group, _MEMORY_COUNTS[group.version]).splitlines()
            counts = dict(line.split() for line in lines)
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def cpu_quota(*, root: Path = Path("/")) -> float | None:
    """Return how many CPUs' time this process and others of its group may use; None if all."""
    quotas = []
    for group in _groups("cpu", root):
        with suppress(OSError, ValueError, ZeroDivisionError):  # "max", which is no number
            if group.version == 2:
                limit, _, period = _read(group, "cpu.max").partition(" ")
            else:
                limit = _read(group, "cpu.cfs_quota_us")
                period = _read(group, "cpu.cfs_period_us")
            quotas.append(int(limit) / int(period))
    return min((quota for quota in quotas if quota > 0), default=None)  # -1 for none


def _read(group: _Group, name: str) -> str:
    return (group.folder / name).read_text(encoding="ascii").strip()


def _groups(controller: _Controller, root: Path) -> Iterator[_Group]:
    """Yield the process's groups with a controller and the groups above them, the nearest first.

    Args:
        controller: whose limits are read.
        root: the folder with proc/self and the mounts in it.
    """
    own = _own_groups(controller, root)
    for version, top, folder in _mounts(controller, root):
        if version not in own:
            continue
        inner = PurePosixPath()
        # Elsewhere it is a namespace of its own, or the mount of another group: what is known is
        # the top. The path may also be the host's, in a container that sees its own group as the
        # top: then only the top has files.
        with suppress(ValueError):
            inner = own[version].relative_to(top)
        if ".." in inner.parts:
            inner = PurePosixPath()
        for part in (inner, *inner.parents):
            yield _Group(version, folder / part)


def _own_groups(controller: _Controller, root: Path) -> dict[int, PurePosixPath]:
    """Return this process's group in each version, of lines like 4:cpu,cpuacct:/docker/ab."""
    found = {}
    for line in read_lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            if not controllers:
                found[2] = PurePosixPath(path)
            elif controller in controllers.split(","):
                found[1] = PurePosixPath(path)
    return found


def _mounts(controller: _Controller, root: Path) -> Iterator[tuple[int, PurePosixPath, Path]]:
    """Yield the version of each mounted hierarchy, the group that is mounted, and the folder.

    Source: proc_pid_mountinfo(5): fields 4 and 5 are the top and the place, and after the hyphen
    stand the type, the source and the options of the file system (man-pages 6.9, 2026-11-27).
    """
    for line in read_lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        places, kinds = before.split(" "), after.split(" ")
        if len(places) < 6 or len(kinds) < 3:
            continue
        is_v1 = kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if is_v1 or kinds[0] == "cgroup2":
            # A blank in a path is written as \040.
            top, place = (text.replace("\\040", " ") for text in places[3:5])
            yield 1 if is_v1 else 2, PurePosixPath(top), root / place.lstrip("/")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; none if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []

"""May this user write where a run writes, and is there room?"""

from __future__ import annotations

from collections.abc import Iterator

from attnimg.machine.host_facts import WORKING_FOLDER, Check, Folder, Host, Status

_GIB = 1 << 30
# A checkpoint of a 7B LoRA run with its optimizer is under 1 GiB, a full one 80: below the first
# nothing can be saved, below the second much can't.
_DISK_FAIL, _DISK_WARN = 1 * _GIB, 20 * _GIB
# Docker's default is 64 MiB; data loaders' workers and NCCL die of it with a bus error.
# Source: https://github.com/NVIDIA/nccl/issues/290 (2026-11-21).
_SHM_WARN = 1 * _GIB


def check_user(host: Host) -> Iterator[Check]:
    """Judge the user's name, which PyTorch's compiler asks for."""
    if host.user is None:
        yield Check(
            code="user",
            status="fail",
            what=f"user {host.uid} has no name: torch.compile stops with a KeyError of getpwuid",
            do="set USER and LOGNAME, for example -e USER=me -e LOGNAME=me",
        )
        return
    root = "; as root, so what it writes on a mounted folder is root's" if host.uid == 0 else ""
    yield Check(
        code="user",
        status="warn" if root else "ok",
        what=f"{host.user} ({host.uid}){root}",
        do="start the container with --user $(id -u):$(id -g)" if root else "",
    )


def check_folders(host: Host) -> Iterator[Check]:
    """Judge HOME, the caches and the working folder: writable, and with room.

    Folders of which the same is to be said share a line: the caches mostly lie on one volume.
    """
    alike: dict[tuple[str, Status, str, str], list[str]] = {}
    for folder in host.folders:
        alike.setdefault(_verdict(folder, uid=host.uid), []).append(
            f"{folder.role} ({folder.path or 'not set'})"
        )
    for (code, status, what, do), names in alike.items():
        yield Check(code=code, status=status, what=f"{', '.join(names)}: {what}", do=do)


def _verdict(folder: Folder, *, uid: int) -> tuple[str, Status, str, str]:
    """Say of one folder: code, status, what was found, what to do."""
    if not folder.writable and folder.role == WORKING_FOLDER:
        # An output_dir elsewhere will do, so this alone stops nothing.
        what = f"not writable for user {uid}"
        return "folder", "warn", what, "mount a folder of this user's there: -v $PWD:/workspace"
    if not folder.writable:
        what = f"not writable for user {uid}"
        return "folder", "fail", what, "mount a volume that this user may write: -v cache:/cache"
    if folder.free_bytes is None:
        return "folder", "ok", "writable", ""
    free = f"{folder.free_bytes / _GIB:.1f} GiB free"
    if folder.free_bytes >= _DISK_WARN:
        return "folder", "ok", f"writable, {free}", ""
    status: Status = "fail" if folder.free_bytes < _DISK_FAIL else "warn"
    return "disk", status, f"{free}, a checkpoint may need more", "mount a larger volume there"


def check_shared_memory(host: Host) -> Iterator[Check]:
    """Judge /dev/shm."""
    if host.shm_bytes is None or host.shm_bytes < _SHM_WARN:
        size = "absent" if host.shm_bytes is None else f"{host.shm_bytes / (1 << 20):.0f} MiB"
        yield Check(
            code="shm",
            status="warn",
            what=f"/dev/shm is {size}; data loaders' workers and several GPUs need more",
            do="start the container with --shm-size=8g, or with --ipc=host",
        )
    else:
        yield Check(code="shm", status="ok", what=f"/dev/shm {host.shm_bytes / _GIB:.1f} GiB")

"""Where a run would happen: user, folders, shared memory, and whether the kernels are whole."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from attnimg.machine.host_facts import WORKING_FOLDER, Folder, Host, Shadow
from attnimg.machine.shipped_kernels import shipped_kernels, shipped_triton

# Variables that say where something is cached; where one is unset, its default lies under HOME.
_CACHES = ("HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
# Top-level packages of the kernels: a second one elsewhere on sys.path hides one or is hidden.
_KERNEL_PACKAGES = (
    "flash_attn",
    "flash_attn_2_cuda",
    "flash_attn_3",
    "flash_attn_interface",
    "sageattention",
    "xformers",
)
_CUTE = "flash_attn/cute/"


def this_host(*, shm: Path = Path("/dev/shm")) -> Host:
    """Look at this host; nothing is imported, nothing is written."""
    distributions = {_name_and_version(dist): dist for dist in metadata.distributions()}
    records = {name: (dist, _record(dist)) for (name, _), dist in distributions.items()}
    home = os.environ.get("HOME", "")
    return Host(
        uid=os.getuid(),
        user=_user(),
        home=home,
        folders=tuple(_folders(home)),
        shm_bytes=_total(shm),
        installed=dict(distributions.keys()),
        cute_owners=tuple(
            sorted(
                name
                for name, (_, lines) in records.items()
                if any(line.startswith(_CUTE) for line in lines)
            )
        ),
        damaged={
            name: damaged
            for name, (dist, lines) in records.items()
            if name.startswith("flash-attn") and (damaged := _damaged(dist, lines))
        },
        shadows=tuple(_shadows(sys.path)),
        shipped_kernels=shipped_kernels(),
        shipped_triton=shipped_triton(),
    )


def _name_and_version(dist: metadata.Distribution) -> tuple[str, str]:
    """Read both from the head of METADATA; dist.name parses all of it, 80 times 1 ms."""
    head = (dist.read_text("METADATA") or "")[:2000]
    name = re.search(r"^Name: *(.+)$", head, re.MULTILINE)
    version = re.search(r"^Version: *(.+)$", head, re.MULTILINE)
    if name is None or version is None:  # an egg, or metadata of another form
        return _canonical(dist.name), dist.version
    return _canonical(name[1].strip()), version[1].strip()


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _record(dist: metadata.Distribution) -> list[str]:
    """Read RECORD as it stands: parsing 80 of them as csv takes a second."""
    return (dist.read_text("RECORD") or "").splitlines()


def _damaged(dist: metadata.Distribution, lines: Iterable[str]) -> tuple[str, ...]:
    """Name Python files whose hash is not the recorded one, and files that are gone.

    Libraries are looked for, not hashed: hundreds of megabytes would take seconds.
    """
    found = []
    for line in lines:
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


def _shadows(folders: Iterable[str]) -> Iterable[Shadow]:
    existing = dict.fromkeys(Path(folder or ".").resolve() for folder in folders)
    names = {
        folder: {path.name for path in folder.iterdir()} for folder in existing if folder.is_dir()
    }
    for package in _KERNEL_PACKAGES:
        at = tuple(
            str(folder)
            for folder, inside in names.items()
            if any(name == package or name.startswith(f"{package}.") for name in inside)
        )
        if len(at) > 1:
            yield Shadow(package=package, folders=at)


def _folders(home: str) -> Iterable[Folder]:
    yield _folder("HOME", home)
    for name in _CACHES:
        if name in os.environ:
            yield _folder(name, os.environ[name])
    yield _folder(WORKING_FOLDER, str(Path.cwd()))


def _folder(role: str, path: str) -> Folder:
    """Ask of a folder, or of the nearest one above it that exists."""
    nearest = Path(path or "/nonexistent").absolute()
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    free = None
    if nearest.is_dir():
        status = os.statvfs(nearest)
        free = status.f_bavail * status.f_frsize
    return Folder(role=role, path=path, writable=writable, free_bytes=free)


def _total(path: Path) -> int | None:
    if not path.is_dir():
        return None
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def _user() -> str | None:
    """Give the user's name as libraries ask for it; None where that raises."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if name := os.environ.get(variable):
            return name
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None

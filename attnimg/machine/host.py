"""Read the state of this host that `doctor` checks: user, folders, shared memory, packages."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from attnimg.cgroup import cpu_quota
from attnimg.distributions import distributions
from attnimg.machine.container import (
    CACHES,
    LIBCUDA,
    Runtime,
    can_write,
    find_driver_program,
    find_runtime,
    nearest_existing,
    replaced_cache,
    unusable_folders,
    working_folder,
)
from attnimg.machine.kernel_cache import ShippedKernels, shipped_kernels, shipped_triton
from attnimg.machine.network import Rdma, read_rdma
from attnimg.machine.probe import canonical, changed_files, read_record
from attnimg.selection.gpus_and_images import cpu_name

WORKING_FOLDER = "the working folder"
# Top-level packages of the kernels; of two with one name on sys.path, one shadows the other.
_KERNEL_PACKAGES = (
    "flash_attn",
    "flash_attn_2_cuda",
    "flash_attn_3",
    "flash_attn_interface",
    "sageattention",
    "xformers",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder that a run writes to.

    Attributes:
        role: the environment variable that names it, or WORKING_FOLDER.
        path: its path.
        writable: whether this user can write to it, or create it.
        free_bytes: free space of its file system; None where that is not known.
    """

    role: str
    path: str
    writable: bool
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The state of a host that `doctor` checks, besides the GPU.

    Attributes:
        uid: the user's id.
        user: the result of getpass.getuser(), which reads USER and others first; None where it
            raises.
        account: the user's name in /etc/passwd; None without one, as with --user in a container.
        folders: HOME, the caches and the working folder.
        shm_bytes: size of /dev/shm; None without one.
        installed: every distribution, by its normalized name (PEP 503) -> its version.
        cute_owners: distributions that list files of flash_attn/cute/ in their RECORD.
        damaged: distribution -> its missing or changed files, for flash_attn's packages.
        shadows: import package of a kernel that is in several folders of sys.path -> these
            folders, in the order of sys.path; the first one is imported.
        unused_packages: why packages that a user has installed are not used; empty if they are.
        shipped_kernels: FlashAttention-4's precompiled kernels in the image; None without any.
        shipped_triton: SageAttention's precompiled Triton kernels in the image.
        runtime: what started the container; None outside of one.
        replaced_cache: why another cache folder is used; None if none is.
        unusable_folders: why no folder can have the caches; empty if one can.
        cuda_error: the loader's message on libcuda; None where it loads, and without nvidia-smi.
        noexec: cache folders whose file system runs no code.
        rdma: the adapters that connect machines; None where they were not read.
        cpus: CPUs of the affinity mask.
        quota: the smallest quota of the cgroups, in CPUs; None without one.
        threads: OMP_NUM_THREADS; None where it is not set.
        cpu: the CPU architecture, as in platforms of images: "amd64", "arm64".
    """

    uid: int
    user: str | None
    account: str | None
    folders: tuple[Folder, ...]
    shm_bytes: int | None
    installed: Mapping[str, str]
    cute_owners: tuple[str, ...]
    damaged: Mapping[str, tuple[str, ...]]
    shadows: Mapping[str, tuple[str, ...]]
    unused_packages: str = ""
    shipped_kernels: ShippedKernels | None = None
    shipped_triton: ShippedKernels | None = None
    runtime: Runtime | None = None
    replaced_cache: str | None = None
    unusable_folders: tuple[str, ...] = ()
    cuda_error: str | None = None
    noexec: tuple[str, ...] = ()
    rdma: Rdma | None = None
    cpus: int | None = None
    quota: float | None = None
    threads: str | None = None
    cpu: str = "amd64"


def this_host() -> Host:
    """Return the state of this host, without importing packages or writing files."""
    found = {_name_and_version(dist): dist for dist in distributions()}
    # Of two versions in several folders of sys.path, the first is imported.
    installed = dict(reversed(found.keys()))
    flash = {
        name: dist
        for (name, version), dist in found.items()
        if name.startswith("flash-attn") and installed[name] == version
    }
    changed = {name: changed_files(dist, read_record(dist)) for name, dist in flash.items()}
    cute = "flash_attn/cute/"
    owners = [name for (name, _), d in found.items() if read_record(d, under=cute)]
    home = os.environ.get("HOME", "")
    shm, user = Path("/dev/shm"), None
    with suppress(KeyError, OSError):  # OSError from Python 3.13 on
        user = getpass.getuser()
    account = None
    with suppress(KeyError):
        account = pwd.getpwuid(os.getuid()).pw_name
    return Host(
        uid=os.getuid(),
        user=user,
        account=account,
        folders=tuple(_folders(home)),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        installed=installed,
        cute_owners=tuple(sorted(owners)),
        damaged={name: files for name, files in changed.items() if files},
        shadows=_shadows(sys.path),
        unused_packages=_reason_against_added(),
        shipped_kernels=shipped_kernels(),
        shipped_triton=shipped_triton(),
        runtime=find_runtime(os.environ),
        replaced_cache=replaced_cache(os.environ),
        unusable_folders=unusable_folders(os.environ),
        cuda_error=_cuda_error() if find_driver_program("nvidia-smi") else None,
        noexec=tuple(_noexec()),
        rdma=read_rdma(),
        cpus=len(os.sched_getaffinity(0)),
        quota=cpu_quota(),
        threads=os.environ.get("OMP_NUM_THREADS"),
        cpu=cpu_name(os.uname().machine),
    )


def _cuda_error() -> str | None:
    """Load libcuda in another process, as a broken driver may crash it; return the error."""
    import subprocess  # takes 3 ms, and is not needed without a GPU

    code = f"import ctypes; ctypes.CDLL({LIBCUDA!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1] if done.returncode else None


def _noexec() -> Iterator[str]:
    """Yield the folders of compilers' caches whose file system is mounted with noexec."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        folder = Path(os.environ.get(name) or "/nonexistent")
        with suppress(OSError):
            if os.statvfs(folder).f_flag & os.ST_NOEXEC:
                yield str(folder)


def _name_and_version(dist: metadata.Distribution) -> tuple[str, str]:
    """Read both from the head of METADATA: dist.name parses the whole file, 1 ms each for 80."""
    head = (dist.read_text("METADATA") or "")[:2000]
    name = re.search(r"^Name: *(.+)$", head, re.MULTILINE)
    version = re.search(r"^Version: *(.+)$", head, re.MULTILINE)
    if name is None or version is None:  # an egg, or metadata in another format
        return canonical(dist.name), dist.version
    return canonical(name[1].strip()), version[1].strip()


def _reason_against_added() -> str:
    """Return why the packages of /opt/added are not used (docker/added/attnimg_added.py)."""
    if "attnimg_added" not in sys.modules:  # outside an image
        return ""
    return str(sys.modules["attnimg_added"].reason_against())


def _shadows(folders: Iterable[str]) -> dict[str, tuple[str, ...]]:
    names: dict[str, list[str]] = {}
    for folder in folders:
        with suppress(OSError):  # no folder, or one that this user can't read
            place = Path(folder or ".").resolve()
            names[str(place)] = [path.name for path in place.iterdir()]
    found = {
        package: tuple(
            folder
            for folder, inside in names.items()
            if any(name == package or name.startswith(f"{package}.") for name in inside)
        )
        for package in _KERNEL_PACKAGES
    }
    return {package: at for package, at in found.items() if len(at) > 1}


def _folders(home: str) -> Iterator[Folder]:
    # The caches' defaults are under HOME.
    paths = {name: os.environ[name] for name in CACHES if name in os.environ}
    for role, path in {"HOME": home, **paths, WORKING_FOLDER: str(working_folder())}.items():
        folder, free_bytes = Path(path or "/nonexistent"), None
        with suppress(OSError):
            free_bytes = shutil.disk_usage(nearest_existing(folder)).free
        writable = can_write(folder)
        yield Folder(role=role, path=path, writable=writable, free_bytes=free_bytes)

"""The values of a preflight: where a run would happen, and what was found there.

Frozen and plain, as everything in facts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]
WORKING_FOLDER = "the working folder"


@dataclass(frozen=True, kw_only=True, slots=True)
class Folder:
    """A folder that a run writes to.

    Attributes:
        role: the environment variable that names it, or WORKING_FOLDER.
        path: where.
        writable: whether this user may write there, or make it.
        free_bytes: what is free on its file system; None where that can't be asked.
    """

    role: str
    path: str
    writable: bool
    free_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shadow:
    """An import package that stands in several folders of sys.path: the first one wins.

    Attributes:
        package: the top-level name, "flash_attn".
        folders: all that have it, in the order of sys.path.
    """

    package: str
    folders: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShippedKernels:
    """Kernels that were compiled with the image, and what would use them.

    Attributes:
        key: names what they were compiled with; of FlashAttention-4's, in the cache's folders.
        built: what that was: "python" or a package -> its version, a folder -> its hash.
        found: the same as it is here.
        kernels: architecture -> how many there are, "sm_90".
        settings: variables that are set here and have other kernels looked for, or elsewhere.
    """

    key: str
    built: Mapping[str, str]
    found: Mapping[str, str]
    kernels: Mapping[str, int]
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What a preflight looks at besides the GPU.

    Attributes:
        uid: the user's number.
        user: the name getpass.getuser() gives; None where it raises.
        home: HOME.
        folders: HOME, the caches and the working folder.
        shm_bytes: size of /dev/shm; None without one.
        installed: every distribution -> its version, names as PEP 503 spells them.
        cute_owners: distributions that claim files of flash_attn/cute/.
        damaged: distribution -> its files that are missing or changed, for flash_attn's packages.
        shadows: kernels' packages that stand in several folders.
        shipped_kernels: FlashAttention-4's that came compiled with the image; None without any.
        shipped_triton: SageAttention's Triton kernels that did.
    """

    uid: int
    user: str | None
    home: str
    folders: tuple[Folder, ...]
    shm_bytes: int | None
    installed: Mapping[str, str]
    cute_owners: tuple[str, ...]
    damaged: Mapping[str, tuple[str, ...]]
    shadows: tuple[Shadow, ...]
    shipped_kernels: ShippedKernels | None = None
    shipped_triton: ShippedKernels | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of a preflight.

    Attributes:
        code: what was looked at, "driver".
        status: whether it will do.
        what: what was found, in one sentence.
        do: the fix; empty where there is nothing to fix.
    """

    code: str
    status: Status
    what: str
    do: str = ""

"""Set where FlashAttention-4 finds the kernels that were compiled with the image.

FlashAttention-4 opens a lock file beside each kernel that it looks up: the image's own folder,
which nobody may write, would raise inside the attention call. So the folder of this GPU is copied
once to where caches are kept, and two variables name it. Both are read when flash_attn.cute is
imported (flash-attn-4 4.0.0b36, cache_utils.py, read 2026-11-25).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from attnimg.facts import Machine
from attnimg.machine.kernel_cache.notes import say
from attnimg.machine.shipped import reasons_against_shipped
from attnimg.machine.shipped_kernels import CACHE_AT, CACHE_ON, FOLDER, shipped_kernels


def fa4_settings(
    machine: Machine, environment: Mapping[str, str], *, shipped: Path = FOLDER
) -> dict[str, str]:
    """Copy the kernels for this machine to the user's cache, and give the variables to set.

    Args:
        machine: its GPU and driver.
        environment: names the cache; what it says of FlashAttention-4's own cache holds.
        shipped: the image's kernels.

    Returns:
        Variable -> value; none where the image has no kernels that fit, or a person chose.

    Raises:
        AttnimgError: the image's manifest can't be read.
    """
    if machine.arch.vendor != "nvidia" or {CACHE_ON, CACHE_AT} & set(environment):
        return {}
    kernels = shipped_kernels(shipped)
    if kernels is None or reasons_against_shipped(kernels, machine):
        return {}
    source = shipped / machine.arch.name
    name = Path(kernels.key) / f"{machine.arch.name}-{_cpu()}"
    for folder in _folders(environment):
        if _copied(source, folder / name):
            return {CACHE_ON: "1", CACHE_AT: str(folder / name)}
    tried = ", ".join(str(folder) for folder in _folders(environment))
    say(f"FlashAttention-4 compiles its kernels anew: no room of one's own in {tried}")
    return {}


def _folders(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yield where the copy may be kept: attnimg's cache, or else the temporary folder.

    The second is for a volume whose folders another user made.
    """
    if named := environment.get("ATTNIMG_CACHE"):
        yield Path(named) / f"flash-attn-4-{os.getuid()}"
    else:
        from platformdirs import user_cache_path

        yield user_cache_path("attnimg") / "flash-attn-4"
    try:
        yield Path(tempfile.gettempdir()) / f"attnimg-flash-attn-4-{os.getuid()}"
    except FileNotFoundError:  # there is none that this user may write
        return


def _copied(source: Path, target: Path) -> bool:
    """Copy a folder as a whole for this user, whoever else copies it at the same time."""
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            for path in source.rglob("*.o"):
                copy = temporary / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            try:
                temporary.rename(target)
            except OSError:  # another process was first; its copy is as good
                if not target.is_dir():
                    raise
        # What lies there is loaded and run: never from folders that another user can change.
        owners = {folder.stat().st_uid for folder in (target, *target.parents[:2])}
        return owners == {os.getuid()} and os.access(target, os.W_OK)
    except OSError:  # not writable, or no room
        return False
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name this kind of CPU.

    What FlashAttention-4 adds to its cache is compiled for the CPU it runs on, and no key tells: on
    a volume that several machines share, an older one would die of an illegal instruction.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    words = sorted(flags.partition(":")[2].split())
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]

"""Compile FlashAttention-4's kernels: the functions that build.py and worker.py call.

A part of a set is a head_dim. FOLDER/FINGERPRINT/KIND/HASH.o is an entry, in the layout of
FlashAttention-4's cache: an object file with the launcher and the GPU code.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from precompiled.entries import beyond_baseline, check_gpu_code
from precompiled.fa4.kernel_set import Call, calls_of

from attnimg.machine.fingerprint import RELEASE, cache_key, fingerprint

__all__ = ["fingerprint"]

FOREIGN = re.compile(r"(FLASH_ATTENTION|FA|CUTE_DSL|QUACK)_")
ADVICE = "fix that, or correct what attnimg/backends/flash_attention_4.py takes there"
# Where the Dockerfile mounts a stage that has objdump(1); elsewhere the one on PATH is used.
BINUTILS = Path("/binutils")


def state_name(found: dict[str, str]) -> str:
    """Return the folder name for kernels that these packages and this code compile.

    Patch releases of Python share it: some entries have another name in each.
    """
    same = {name: value for name, value in found.items() if name != RELEASE}
    # Entries of another retarget.py differ, although FlashAttention-4 names them the same.
    source = Path(__file__).with_name("retarget.py").read_text()
    way = f"llvmlite {metadata.version('llvmlite')} {source}"
    return f"{cache_key(same)}-{hashlib.sha256(way.encode()).hexdigest()[:8]}"


def parts(asked: dict[str, Any], device: str) -> list[str]:
    """Return the head_dims of a target: each is compiled by a process of its own."""
    return [str(size) for size in sorted({call.head_dim for call in calls_of(asked, device)})]


def cache(folder: Path) -> Path:
    """Return the folder of the entries; its name is FlashAttention-4's own fingerprint."""
    (found,) = (path for path in folder.iterdir() if path.name != "calls")
    return found


def files(entry: Path) -> list[Path]:
    """Return the files of an entry."""
    return [entry]


def check(entry: Path, code: str) -> None:
    """Exit if an entry is for another GPU, or for some CPUs only."""
    check_gpu_code(entry, code)
    objdump, env = "objdump", None
    if (BINUTILS / "bin/objdump").exists():
        objdump = str(BINUTILS / "bin/objdump")
        env = {"LD_LIBRARY_PATH": str(BINUTILS / f"lib/{os.uname().machine}-linux-gnu")}
    if found := beyond_baseline(entry, objdump=objdump, env=env):
        sys.exit(f"precompiled: {entry} needs a CPU with {' '.join(found)}, needed any x86-64")


def start(asked: dict[str, Any], device: str, folder: Path) -> dict[str, bool]:
    """Set up this process to compile for a target; return the entries it looks up from here on."""
    refuse_other_cpu(os.uname().machine)
    target = asked["targets"][device]
    # FlashAttention-4 and CuTe DSL read these at import.
    os.environ |= {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder),
        "FLASH_ATTENTION_ARCH": device,
        "FLASH_ATTENTION_NUM_SMS": str(target["multiprocessors"]),
        "CUTE_DSL_ARCH": target["code"],
    }
    from precompiled.fa4.retarget import retarget_exports

    retarget_exports()
    without_gpu(target["multiprocessors"])
    return watch()


def refuse_other_cpu(machine: str) -> None:
    """Exit on a CPU that retarget.py compiles no launchers for."""
    if machine != "x86_64":
        sys.exit(
            "precompiled: the launchers of FlashAttention-4's kernels are compiled for x86-64\n"
            f"  why: found {machine}; no entry was tried on another CPU\n"
            "  do:  add this CPU to retarget.py and entries.py, then build and test such an image"
        )


def without_gpu(multiprocessors: int) -> None:
    """Simulate the driver's answer on the GPU's size, which sm_100 kernels need for tracing."""
    import cutlass.utils
    from cutlass.utils import hardware_info
    from flash_attn.cute import tile_scheduler

    class HardwareInfo:
        def __init__(self, device_id: int = 0) -> None:
            pass

        def get_device_multiprocessor_count(self) -> int:
            return multiprocessors

        def get_max_active_clusters(self, cluster_size: int) -> int:
            return multiprocessors // cluster_size

    for module in (hardware_info, cutlass.utils, tile_scheduler):
        module.HardwareInfo = HardwareInfo


def watch() -> dict[str, bool]:
    """Record each entry that is looked up from here on: KIND/HASH.o -> whether it was compiled."""
    from flash_attn.cute.cache_utils import JITPersistentCache

    entries: dict[str, bool] = {}
    load, store = JITPersistentCache.__contains__, JITPersistentCache.__setitem__

    def name(cache: Any, key: Any) -> str:
        return f"{cache.cache_path.name}/{cache._key_to_hash(key)}.o"

    def contains(cache: Any, key: Any) -> bool:
        found: bool = load(cache, key)
        if found:
            entries.setdefault(name(cache, key), False)
        return found

    def setitem(cache: Any, key: Any, kernel: Any) -> None:
        store(cache, key, kernel)
        # Upstream only logs a failed export; the kernel would be missing.
        if not (cache.cache_path / f"{cache._key_to_hash(key)}.o").exists():
            raise RuntimeError("FlashAttention-4 could not export this kernel (FA_LOG_LEVEL=1)")
        entries[name(cache, key)] = True

    JITPersistentCache.__contains__ = contains
    JITPersistentCache.__setitem__ = setitem
    return entries


def calls(
    asked: dict[str, Any], device: str, part: str
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each call of one head_dim by name."""
    for call in calls_of(asked, device):
        if str(call.head_dim) == part:
            yield str(call), partial(_compile, call)


def _compile(call: Call) -> None:
    """Compile the kernels of a call that are not in the cache; nothing is launched."""
    import torch
    from precompiled.fa4.attention_call import attend
    from torch._subclasses.fake_tensor import FakeTensorMode

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", **options)

    with FakeTensorMode():
        attend(call, empty=empty)

"""Compile the kernels of one head_dim for one compute capability: the worker of build.py.

    python compile_calls.py SET.json DEVICE HEAD_DIM FOLDER

FOLDER becomes FlashAttention-4's cache; beside it, FOLDER/calls/NAME.json records for each call
the entries it needs and the CPU seconds they cost. What is there already is not compiled again, so
that an interrupted build goes on. One line a call is printed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kernel_set import Call, Target, read_set


def environment(target: Target, folder: Path) -> dict[str, str]:
    """Say what FlashAttention-4 and CuTe DSL are to compile for; both read it at import."""
    return {
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(folder),
        "FLASH_ATTENTION_ARCH": target.device,
        "FLASH_ATTENTION_NUM_SMS": str(target.multiprocessors),
        "CUTE_DSL_ARCH": target.code,
    }


def without_gpu(target: Target) -> None:
    """Answer what kernels of sm_100 ask the driver while they are traced: the GPU's size."""
    import cutlass.utils
    from cutlass.utils import hardware_info
    from flash_attn.cute import tile_scheduler

    class HardwareInfo:
        def __init__(self, device_id: int = 0) -> None:
            pass

        def get_device_multiprocessor_count(self) -> int:
            return target.multiprocessors

        def get_max_active_clusters(self, cluster_size: int) -> int:
            return target.multiprocessors // cluster_size

    for module in (hardware_info, cutlass.utils, tile_scheduler):
        module.HardwareInfo = HardwareInfo


class Watch:
    """Notes which entries a call looks up, and which of them had to be compiled."""

    def __init__(self) -> None:
        from flash_attn.cute.cache_utils import JITPersistentCache

        self.entries: dict[str, bool] = {}  # kind/hash.o -> compiled
        load, store = JITPersistentCache.__contains__, JITPersistentCache.__setitem__

        def contains(cache: Any, key: Any) -> bool:
            found: bool = load(cache, key)
            if found:
                self.entries.setdefault(self.name(cache, key), False)
            return found

        def setitem(cache: Any, key: Any, kernel: Any) -> None:
            store(cache, key, kernel)
            # A failed export is a log line upstream, and would be a kernel that is missing.
            if not (cache.cache_path / f"{cache._key_to_hash(key)}.o").exists():
                raise RuntimeError("FlashAttention-4 could not export this kernel (FA_LOG_LEVEL=1)")
            self.entries[self.name(cache, key)] = True

        JITPersistentCache.__contains__ = contains
        JITPersistentCache.__setitem__ = setitem

    @staticmethod
    def name(cache: Any, key: Any) -> str:
        """Name an entry by its path below the fingerprint."""
        return f"{cache.cache_path.name}/{cache._key_to_hash(key)}.o"


def compile_call(call: Call, watch: Watch) -> dict[str, Any]:
    """Compile what a call needs and does not find; return what that was."""
    import torch
    from attention_call import attend
    from torch._subclasses.fake_tensor import FakeTensorMode

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", **options)

    watch.entries.clear()
    began = time.process_time()
    with FakeTensorMode():
        attend(call, empty=empty)
    return {
        "entries": dict(sorted(watch.entries.items())),
        "cpu_s": round(time.process_time() - began, 2),
    }


def names_in(record: Path) -> set[str]:
    """Name the entries that a call's record has."""
    return {*json.loads(record.read_text())["entries"]}


def main(set_file: Path, device: str, head_dim: int, folder: Path) -> None:
    """Compile every call of one head_dim; stop at the first that can't be."""
    target = next(target for target in read_set(set_file) if target.device == device)
    os.environ.update(environment(target, folder))
    from retarget import retarget_exports

    retarget_exports()
    without_gpu(target)
    watch = Watch()
    records = folder / "calls"
    records.mkdir(parents=True, exist_ok=True)
    for call in target.calls_of(head_dim):
        done = compile_call(call, watch)
        new = sum(done["entries"].values())
        print(f"{device} {call}: {new} compiled, {done['cpu_s']:.1f} s of CPU", flush=True)
        record = records / f"{call}.json"
        # Other names, though nothing is new: this Python compiled, then another, now this again.
        if new or not record.exists() or names_in(record) != {*done["entries"]}:
            # Whole or not at all: a build may be killed at any moment, or another run beside it.
            part = records / f".{call}.{os.getpid()}"
            part.write_text(json.dumps(done, indent=1) + "\n")
            part.replace(record)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))

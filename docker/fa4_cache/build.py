"""Compile an image's set of FlashAttention-4 kernels without a GPU, check them, write a manifest.

    python build.py SET.json STATE OUT

OUT gets one folder a compute capability, and manifest.json. STATE keeps what was compiled: whatever
is there for the same packages is not compiled again. JOBS processes run at once, of 1 GB and a core
each; by default as many as there are cores. In the end every kernel of the set is there, or the
build stops with the reason: what a recipe leaves out stands in the manifest, with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from entries import beyond_baseline, check_gpu_code
from fingerprint import RELEASE, fingerprint, key_of
from kernel_set import Target, read_set

HERE = Path(__file__).parent
# Where the Dockerfile mounts a stage that has objdump(1); elsewhere the one on PATH will do.
BINUTILS = Path("/binutils")


def compile_all(set_file: Path, targets: tuple[Target, ...], *, state: Path) -> None:
    """Run a worker for each target and head_dim, JOBS at a time; end at the first that fails."""
    tasks = [
        (target.device, str(head_dim))
        for target in targets
        for head_dim in sorted({call.head_dim for call in target.calls})
    ]
    # Nothing that changes a kernel comes from outside.
    foreign = ("FLASH_ATTENTION_", "FA_", "CUTE_DSL_", "QUACK_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}

    def work(task: tuple[str, str]) -> tuple[str, str, int]:
        device, head_dim = task
        # CuTe DSL warns of each kernel's arguments, in a kilobyte a time.
        worker = [sys.executable, "-BWignore", str(HERE / "compile_calls.py"), str(set_file)]
        done = subprocess.run(
            [*worker, device, head_dim, str(state / device)], env=env, check=False
        )
        return device, head_dim, done.returncode

    with ThreadPoolExecutor(int(os.environ.get("JOBS") or os.cpu_count() or 1)) as pool:
        failed = [result for result in pool.map(work, tasks) if result[2]]
    for device, head_dim, code in failed:
        print(f"fa4_cache: {device} head_dim {head_dim} ended with {code}", file=sys.stderr)
    if failed:
        sys.exit(
            "fa4_cache: fix that, or correct what attnimg/backends/flash_attention_4.py takes there"
        )


def collect(target: Target, *, state: Path, out: Path) -> dict[str, Any]:
    """Copy the entries that a target's calls need, check each; return what they are."""
    records = {
        str(call): json.loads((state / target.device / "calls" / f"{call}.json").read_text())
        for call in target.calls
    }
    (cache,) = (path for path in (state / target.device).iterdir() if path.name != "calls")
    sizes: dict[str, int] = {}
    digest = hashlib.sha256()
    for name in sorted({name for record in records.values() for name in record["entries"]}):
        entry = out / target.device / cache.name / name
        entry.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(cache / name, entry)
        check(entry, target)
        sizes[name] = entry.stat().st_size
        digest.update(f"{name} {hashlib.sha256(entry.read_bytes()).hexdigest()}\n".encode())
    return {
        "code": target.code,
        "multiprocessors": target.multiprocessors,
        "kernels": len(sizes),
        "bytes": sum(sizes.values()),
        "sha256": digest.hexdigest(),
        "cpu_s": round(sum(record["cpu_s"] for record in records.values())),
        "left_out": target.left_out,
        "calls": {call: sorted(record["entries"]) for call, record in records.items()},
        "entries": sizes,
    }


def check(entry: Path, target: Target) -> None:
    """End the build at an entry for another GPU, or for some CPUs only."""
    check_gpu_code(entry, target.code)
    objdump, env = "objdump", None
    if (BINUTILS / "bin/objdump").exists():
        objdump = str(BINUTILS / "bin/objdump")
        env = {"LD_LIBRARY_PATH": str(BINUTILS / "lib/x86_64-linux-gnu")}
    if found := beyond_baseline(entry, objdump=objdump, env=env):
        sys.exit(f"fa4_cache: {entry} needs a CPU with {' '.join(found)}, needed any x86-64")


def main(set_file: Path, state: Path, out: Path) -> None:
    """Compile, check, and write the manifest last."""
    began = time.monotonic()
    targets, found = read_set(set_file), fingerprint()
    # Entries made in another way are others, though FlashAttention-4 would take either.
    way = f"llvmlite {metadata.version('llvmlite')} {(HERE / 'retarget.py').read_text()}"
    # Another patch release of Python asks for some entries by other names, and shares the rest.
    same = {name: value for name, value in found.items() if name != RELEASE}
    state = state / f"{key_of(same)}-{hashlib.sha256(way.encode()).hexdigest()[:8]}"
    compile_all(set_file, targets, state=state)
    built = {target.device: collect(target, state=state, out=out) for target in targets}
    manifest = {"key": key_of(found), "fingerprint": found, "targets": built}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for device, told in built.items():
        print(
            f"fa4_cache: {device}: {told['kernels']} kernels for {len(told['calls'])} calls, "
            f"{told['bytes'] / 1e6:.1f} MB, {told['cpu_s']} s of CPU"
        )
    print(f"fa4_cache: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

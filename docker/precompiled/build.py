"""Compile an image's set of kernels without a GPU, check them, write a manifest.

    python -m precompiled.build SET.json STATE OUT

SET.json is docker/images/IMAGE/*_kernels.json; its "method" names the module for the compiler, in a
folder beside this file. OUT gets one folder per compute capability, and manifest.json. STATE keeps
what was compiled: kernels of the same packages are not compiled again. JOBS processes run in
parallel, by default one per core. If a kernel of the set can't be compiled, the build stops with
the reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from attnimg.machine.fingerprint import cache_key


def compile_all(set_file: Path, tasks: Iterable[tuple[str, str]], *, state: Path) -> None:
    """Run a worker for each device and part of its calls; exit if one fails."""
    method = import_module(json.loads(set_file.read_text())["method"])
    # Without the variables that would change a kernel or its name.
    env = {name: value for name, value in os.environ.items() if not method.FOREIGN.match(name)}

    def work(task: tuple[str, str]) -> int:
        worker = [sys.executable, "-BWignore", "-m", "precompiled.worker", str(set_file)]
        device, part = task
        command = [*worker, device, part, str(state / device)]
        return subprocess.run(command, env=env, check=False).returncode

    with ThreadPoolExecutor(int(os.environ.get("JOBS") or os.cpu_count() or 1)) as pool:
        ended = {task: pool.submit(work, task) for task in tasks}
    if failed := {task: code for task, done in ended.items() if (code := done.result())}:
        for (device, part), code in failed.items():
            print(f"precompiled: {device} {part} ended with {code}", file=sys.stderr)
        sys.exit(f"precompiled: {method.ADVICE}")


def collect(asked: dict[str, Any], device: str, *, state: Path, out: Path) -> dict[str, Any]:
    """Copy and check the entries that a target's calls need; return the target's manifest."""
    method, target = import_module(asked["method"]), asked["targets"][device]
    folder = state / device
    records: dict[str, Any] = {}
    for part in method.parts(asked, device):
        found = json.loads((folder / "calls" / f"{part}.json").read_text())
        records |= {name: found["calls"][name] for name in found["set"]}
    cache = method.cache(folder)
    entries = sorted({entry for record in records.values() for entry in record["entries"]})
    sizes: dict[str, int] = {}
    digest = hashlib.sha256()
    for entry in entries:
        sizes[entry] = 0
        for path in method.files(cache / entry):
            copy = out / device / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            method.check(copy, target["code"])
            sizes[entry] += copy.stat().st_size
            content = hashlib.sha256(copy.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(cache)} {content}\n".encode())
    return {
        **{key: value for key, value in target.items() if key != "shapes"},
        "kernels": len(entries),
        "bytes": sum(sizes.values()),
        "sha256": digest.hexdigest(),
        "compiled": sum(record["compiled"] for record in records.values()),
        "cpu_s": round(sum(record["cpu_s"] for record in records.values())),
        "calls": {name: record["entries"] for name, record in records.items()},
        "entries": sizes,
    }


def main(set_file: Path, state: Path, out: Path) -> None:
    """Compile, check, and write the manifest last."""
    began = time.monotonic()
    asked = json.loads(set_file.read_text())
    method = import_module(asked["method"])
    found = method.fingerprint()
    state = state / method.state_name(found)
    tasks = [(device, part) for device in asked["targets"] for part in method.parts(asked, device)]
    compile_all(set_file, tasks, state=state)
    built = {device: collect(asked, device, state=state, out=out) for device in asked["targets"]}
    manifest = {"key": cache_key(found), "fingerprint": found, "targets": built}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for device, made in built.items():
        print(
            f"precompiled: {device}: {made['kernels']} kernels for {len(made['calls'])} calls, "
            f"{made['bytes'] / 1e6:.1f} MB, {made['cpu_s']} s of CPU"
        )
    print(f"precompiled: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

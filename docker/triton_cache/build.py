"""Compile an image's set of Triton kernels without a GPU, check them, write a manifest.

    python build.py SET.json STATE OUT

OUT gets one folder a compute capability, of each entry its machine code and what Triton notes of
it, and manifest.json. STATE keeps a cache of Triton's for the same packages: what is there is not
compiled again. JOBS processes run at once, one a compute capability.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from entries import check_gpu_code
from fingerprint import key_of, triton_fingerprint

HERE = Path(__file__).parent
# An entry's other files are the steps between source and machine code: no launch reads them.
SHIPPED = (".cubin", ".json")
# A group names its files by their folder; attnimg.machine.kernel_cache rewrites it in the copy.
GROUP = "__grp__"


def compile_all(set_file: Path, devices: list[str], *, state: Path) -> None:
    """Run a worker for each compute capability, JOBS at a time; end at one that fails."""
    # Nothing that changes a kernel or its name comes from outside.
    env = {name: value for name, value in os.environ.items() if "TRITON" not in name}

    def work(device: str) -> int:
        worker = [sys.executable, "-BWignore", str(HERE / "compile_calls.py"), str(set_file)]
        paths = [str(state / "cache"), str(state / f"{device}.json")]
        return subprocess.run([*worker, device, *paths], env=env, check=False).returncode

    with ThreadPoolExecutor(int(os.environ.get("JOBS") or os.cpu_count() or 1)) as pool:
        codes = dict(zip(devices, pool.map(work, devices), strict=True))
    if failed := {device: code for device, code in codes.items() if code}:
        sys.exit(f"triton_cache: ended with {failed}; mend that, or shorten the recipe's [triton]")


def collect(code: str, record: dict[str, Any], *, cache: Path, out: Path) -> dict[str, Any]:
    """Copy the entries that one compute capability needs, check each; tell what they are."""
    sizes: dict[str, int] = {}
    digest = hashlib.sha256()
    for entry in record["entries"]:
        (out / entry).mkdir(parents=True)
        for path in sorted((cache / entry).iterdir()):
            if path.suffix in SHIPPED and not path.name.startswith(GROUP):
                copy = Path(shutil.copyfile(path, out / entry / path.name))
                sizes[f"{entry}/{path.name}"] = copy.stat().st_size
                digest.update(hashlib.sha256(copy.read_bytes()).digest())
        (cubin,) = (out / entry).glob("*.cubin")
        check_gpu_code(cubin, code)
    return {
        "code": code,
        "kernels": len(record["entries"]),
        "bytes": sum(sizes.values()),
        "sha256": digest.hexdigest(),
        "compiled": record["compiled"],
        "cpu_s": record["cpu_s"],
        "calls": record["calls"],
        "entries": record["entries"],
    }


def main(set_file: Path, state: Path, out: Path) -> None:
    """Compile, check, and write the manifest last."""
    targets = json.loads(set_file.read_text())["targets"]
    found = triton_fingerprint()
    # Another cache for other packages, though they may share entries: so a record tells all costs.
    state = state / key_of(found)
    state.mkdir(parents=True, exist_ok=True)
    compile_all(set_file, [*targets], state=state)
    told = {}
    for device, target in targets.items():
        record = json.loads((state / f"{device}.json").read_text())
        told[device] = collect(target["code"], record, cache=state / "cache", out=out / device)
        print(
            f"triton_cache: {device}: {told[device]['kernels']} kernels for "
            f"{record['calls']} calls, {told[device]['bytes'] / 1e6:.1f} MB, "
            f"{record['cpu_s']} s of CPU"
        )
    manifest = {"key": key_of(found), "fingerprint": found, "targets": told}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))

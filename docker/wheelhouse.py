"""Write the manifest of a wheelhouse, or verify a wheelhouse before it is installed.

    python wheelhouse.py write FOLDER WANTED.json
    python wheelhouse.py verify FOLDER WANTED.json

FOLDER has the wheels. `write` merges the NAME.json that kernel/build.py wrote for each wheel into
manifest.json, and writes SHA256SUMS. `verify` compares FOLDER with SHA256SUMS and with what the
recipes of this checkout would build (WANTED.json is docker/images/IMAGE/wheelhouse.json): the ABI
and the kernels, each with the key of its recipe. A wheelhouse that was built earlier or on another
machine is refused unless it has the same content.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

_SUMS, _MANIFEST = "SHA256SUMS", "manifest.json"


def write(folder: Path, image: str, abi: str) -> None:
    """Merge the reports of single kernels into one manifest, and write the hashes."""
    reports = []
    for path in sorted(folder.glob("*.json")):
        reports.append(json.loads(path.read_text()))
        path.unlink()
    manifest = {"image": image, "abi": abi, "kernels": reports}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    files = [*sorted(folder.glob("*.whl")), folder / _MANIFEST]
    (folder / _SUMS).write_text("".join(f"{digest(path)}  {path.name}\n" for path in files))


def verify(folder: Path, abi: str, keys: dict[str, str]) -> list[str]:
    """Return all reasons why a wheelhouse can't be installed; none if it fits.

    Args:
        folder: of the wheels.
        abi: what a compiled extension must match here, "cp311-torch2.14-cu130".
        keys: kernel -> the key of its recipe.
    """
    missing = [name for name in (_SUMS, _MANIFEST) if not (folder / name).is_file()]
    if missing:
        return [f"found no {' and no '.join(missing)}"]
    faults = []
    lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    sums = {name: digest_ for digest_, _, name in (line.partition("  ") for line in lines) if name}
    for path in [*sorted(folder.glob("*.whl")), folder / _MANIFEST]:
        if sums.pop(path.name, None) != digest(path):
            faults.append(f"the hash of {path.name} is not in {_SUMS}")
    faults += [f"{name} is missing" for name in sums]
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        built: dict[str, str] = {kernel["name"]: kernel["key"] for kernel in manifest["kernels"]}
        found = manifest["abi"]
    except (ValueError, TypeError, KeyError) as error:
        return [*faults, f"{_MANIFEST} is not a manifest: {type(error).__name__}: {error}"]
    if found != abi:
        faults.append(f"found {found}, needed {abi}")
    for name, key in keys.items():
        if name not in built:
            faults.append(f"the kernel {name} is missing")
        elif built[name] != key:
            faults.append(f"{name} was built from recipe {built[name]}, needed {key}")
    faults += [f"{name} is not a kernel of this image" for name in built if name not in keys]
    return faults


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(task: str, folder: Path, wanted_file: Path) -> None:
    """Write the manifest, or verify the wheelhouse and exit if it does not fit."""
    wanted = json.loads(wanted_file.read_text())
    image = wanted["image"]
    if task == "write":
        write(folder, image, wanted["abi"])
        return
    if faults := verify(folder, wanted["abi"], wanted["kernels"]):
        lines = "\n       ".join(faults)
        sys.exit(
            f"wheelhouse: it does not fit the image {image}\n  why: {lines}\n"
            f"  do:  make wheels/{image} from this checkout, or omit WHEELS to build them"
        )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

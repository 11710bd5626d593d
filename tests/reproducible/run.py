"""Build attnimg:cpu twice without a cache, and list what differs (`make test/reproducible`).

Layers are compared by the hash of their uncompressed content, then file by file. attnimg:cpu is the
second build afterwards. Writes docs/measured/reproducible.json; exit code 1 if a file differs in
more than its time.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs/measured/reproducible.json"
_LISTED = 20


def main() -> None:
    """Build, unless two images are named, compare, and write the record."""
    images = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        archives = [Path(folder, name) for name in ("1.tar", "2.tar")]
        for number, archive in enumerate(archives):
            if len(sys.argv) == 1:
                run(sys.executable, "docker/build.py", "cpu", "--no-cache")
                images = ["attnimg:cpu"] * 2
            run("docker", "save", images[number], "-o", archive)
        record = compare(*archives)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record, indent=1) + "\n")
    sys.exit(any(set(layer["how"]) - {"time"} for layer in record["layers"]))


def run(*command: object) -> None:
    """Run a command that must succeed."""
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Return the layers of two archives, which are equal, and the files that differ and how."""
    with tarfile.open(first) as one, tarfile.open(second) as two:
        configs = [config(archive) for archive in (one, two)]
        names = [layer_names(archive) for archive in (one, two)]
        history = [
            step.get("created_by", "the base")
            for step in configs[0]["history"]
            if not step.get("empty_layer")
        ]
        layers = []
        digests = [found["rootfs"]["diff_ids"] for found in configs]
        for step, left, right, *pair in zip(history, *names, *digests, strict=True):
            files = [list_files(archive, name) for archive, name in ((one, left), (two, right))]
            different = sorted(set(files[0].items()) ^ set(files[1].items()))
            paths = sorted({path for path, _ in different})
            layers.append(
                {
                    "step": " ".join(step.split())[:60],
                    "files": len(files[0]),
                    "same_digest": pair[0] == pair[1],
                    "differs": len(paths),
                    "how": sorted({how(files[0].get(p), files[1].get(p)) for p in paths}),
                    "paths": paths[:_LISTED],
                }
            )
    keys = {*configs[0], *configs[1]}
    return {
        "command": "make test/reproducible",
        "layers": layers,
        "config_differs_in": sorted(k for k in keys if configs[0].get(k) != configs[1].get(k)),
    }


def how(left: tuple[str, ...] | None, right: tuple[str, ...] | None) -> str:
    """Return what differs between two files: content, time, mode, or that one is missing."""
    if left is None or right is None:
        return "in one of them only"
    names = ("content", "time", "mode")
    return " and ".join(n for n, a, b in zip(names, left, right, strict=True) if a != b)


def config(archive: tarfile.TarFile) -> dict[str, Any]:
    """Return an image's config."""
    found: dict[str, Any] = read_json(archive, read_json(archive, "manifest.json")[0]["Config"])
    return found


def layer_names(archive: tarfile.TarFile) -> list[str]:
    """Return the members that are layers, the lowest first."""
    names: list[str] = read_json(archive, "manifest.json")[0]["Layers"]
    return names


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    """Return the content of a JSON member."""
    file = archive.extractfile(name)
    assert file is not None
    return json.load(file)


def list_files(archive: tarfile.TarFile, name: str) -> dict[str, tuple[str, ...]]:
    """Return path -> (hash of the content, time, mode and owner) of a layer."""
    file = archive.extractfile(name)
    assert file is not None
    return dict(read_layer(tarfile.open(fileobj=file, mode="r|*")))


def read_layer(layer: tarfile.TarFile) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the files of a layer."""
    for member in layer:
        content = layer.extractfile(member) if member.isfile() else None
        sha256 = hashlib.sha256(content.read()).hexdigest() if content else member.linkname
        yield member.name, (sha256, str(member.mtime), f"{member.mode:o} {member.uid}:{member.gid}")


if __name__ == "__main__":
    main()

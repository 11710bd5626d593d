"""Write an image as an OCI layout with layers of zstd: the files that a release pushes.

Our own code, since skopeo's conversion to OCI drops HEALTHCHECK from the configuration
(skopeo 1.9.3, run 2026-11-27), and Docker's own push compresses with gzip. Here the configuration
is kept byte for byte, so the image in the registry has the ID that was built and checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import zstandard

from recipes.artifact.facts import Layer

_CHUNK = 1 << 20
_OCI = "application/vnd.oci.image"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compressed:
    """A compressed layer: its size, and its digest as sha256:..."""

    bytes: int
    digest: str


def compress(stream: IO[bytes], *, folder: Path | None = None) -> Compressed:
    """Compress a layer with zstd -3, for the sizes in the gates and for what is pushed.

    Args:
        stream: the plain tar.
        folder: where it is written to, named by its digest; None only measures it.
    """
    if folder is None:
        return _compress(stream, lambda _: None)
    with (folder / "part").open("wb") as out:
        compressed = _compress(stream, out.write)
    (folder / "part").replace(folder / compressed.digest.removeprefix("sha256:"))
    return compressed


def _compress(stream: IO[bytes], write: Callable[[bytes], object]) -> Compressed:
    compressor = zstandard.ZstdCompressor(level=3, threads=2).compressobj()
    digest, size, chunk = hashlib.sha256(), 0, b"start"
    while chunk:
        chunk = stream.read(_CHUNK)
        data = compressor.compress(chunk) if chunk else compressor.flush()
        write(data)
        digest.update(data)
        size += len(data)
    return Compressed(bytes=size, digest=f"sha256:{digest.hexdigest()}")


def write_layout(folder: Path, layers: Iterable[Layer], config: bytes) -> str:
    """Write what an OCI layout has besides its layers; return the digest of its manifest.

    Args:
        folder: of the layout, whose blobs/sha256 has the layers already.
        layers: in order, each with its digest.
        config: the image's configuration, as it is stored.
    """
    blobs = folder / "blobs/sha256"

    def put(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"mediaType": f"{_OCI}.{kind}+json", "digest": f"sha256:{digest}", "size": len(data)}

    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_OCI}.manifest.v1+json",
        "config": put(config, "config.v1"),
        "layers": [
            {
                "mediaType": f"{_OCI}.layer.v1.tar+zstd",
                "digest": layer.digest,
                "size": layer.zstd_bytes,
            }
            for layer in layers
        ],
    }
    stored = put(json.dumps(manifest, separators=(",", ":")).encode(), "manifest.v1")
    index = {"schemaVersion": 2, "mediaType": f"{_OCI}.index.v1+json", "manifests": [stored]}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
    return str(stored["digest"])

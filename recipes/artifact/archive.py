"""Read an image from the file that `docker save` writes, or from an OCI archive.

It needs no Docker daemon. Layers are read in place; a compressed one is unpacked to a temporary
file first. No whole layer is held in memory.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from attnimg.errors import AttnimgError
from recipes.artifact.entries import Entry, read_entry
from recipes.artifact.facts import File, Layer
from recipes.artifact.layout import compress

_CHUNK = 1 << 20
# A part of a layer's command in the history -> the stage of docker/Dockerfile that wrote it.
_STAGES = (
    ("/torch.txt", "torch"),
    ("/stack.txt", "stack"),
    ("/image.txt", "kernels"),
    ("find /wheels", "kernels"),
    ("$APT_PACKAGES", "python"),
)
# The errors of a damaged archive, in its tar and in a compressed layer.
_DAMAGE = (tarfile.TarError, OSError, KeyError, EOFError, zlib.error, zstandard.ZstdError)
_KINDS: dict[bytes, Any] = {
    tarfile.REGTYPE: "file", tarfile.AREGTYPE: "file", tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "hardlink",
}  # fmt: skip


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive; a compressed one is refused, since it has no random access."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except _DAMAGE as error:
        raise AttnimgError(
            f"{path} can't be read as an image",
            why=f"{type(error).__name__}: {error}",
            do="name a file of `docker save IMAGE -o FILE`, not compressed",
            code="bad-archive",
        ) from error


def read_archive(
    path: Path, *, log: Callable[[str], None], blobs: Path | None = None
) -> tuple[tuple[Layer, ...], tuple[File, ...], bytes]:
    """Read every layer of an archive; return its configuration as it is stored, too.

    Args:
        path: docker-archive or OCI archive, not compressed itself; its layers may be.
        log: called with a line of text before each layer is read.
        blobs: a folder for the compressed layers, each named by its digest; None keeps none.

    Raises:
        AttnimgError: it is not an image, or is damaged (code "bad-archive").
    """
    layers: list[Layer] = []
    files: list[File] = []
    with open_archive(path) as tar:
        stored_config, members, history = _read_head(tar)
        names = stage_names([*history, *({} for _ in members[len(history) :])])
        for place, member in enumerate(members):
            step = history[place] if place < len(history) else {}
            name = names[place]
            stored = tar.getmember(member).size / 1e6
            log(f"layer {place + 1} of {len(members)}: {name}, {stored:.0f} MB")
            with _open_layer(tar, member) as stream:
                entries = [read_entry(e, layer=place) for e in _entries(stream)]
                size = stream.seek(0, 2)
                stream.seek(0)
                compressed = compress(stream, folder=blobs)
            files = [*_hide_files(files, entries), *(e for e in entries if not _is_whiteout(e))]
            layers.append(
                Layer(
                    name=name,
                    made_by=str(step.get("created_by", "")),
                    bytes=size,
                    zstd_bytes=compressed.bytes,
                    digest=compressed.digest,
                )
            )
    return tuple(layers), tuple(files), stored_config


def layer_sizes(path: Path, *, log: Callable[[str], None]) -> tuple[list[dict[str, Any]], bytes]:
    """Return the size of each layer of an archive, and its configuration as it is stored.

    A size has the keys name (the stage), bytes, zstd_bytes (with zstd -3) and gzip_bytes (with gzip
    -6, zlib's default and that of `docker push`).

    Args:
        path: as read_archive.
        log: called with a line of text before each layer is read.

    Raises:
        AttnimgError: as read_archive.
    """
    sizes = []
    with open_archive(path) as tar:
        stored_config, members, history = _read_head(tar)
        names = stage_names([*history, *({} for _ in members[len(history) :])])
        for name, member in zip(names, members, strict=False):
            log(f"{name}, {tar.getmember(member).size / 1e6:.0f} MB")
            with _open_layer(tar, member) as stream:
                gzipped, packer = 0, zlib.compressobj(wbits=31)
                while chunk := stream.read(_CHUNK):
                    gzipped += len(packer.compress(chunk))
                size = stream.tell()
                stream.seek(0)
                sizes.append(
                    {
                        "name": name,
                        "bytes": size,
                        "zstd_bytes": compress(stream).bytes,
                        "gzip_bytes": gzipped + len(packer.flush()),
                    }
                )
    return sizes, stored_config


def archive_kind(path: Path) -> str:
    """Return the format of an archive, by the names that syft uses."""
    with open_archive(path) as tar:
        return "docker-archive" if "manifest.json" in tar.getnames() else "oci-archive"


def stage_names(history: list[dict[str, Any]]) -> list[str]:
    """Return the stage of the Dockerfile that made each layer, by its step in the history.

    The layers of the base are those below the first of our own: it may be made by BuildKit too.
    """
    names = []
    for step in history:
        command = str(step.get("created_by", ""))
        own = "buildkit" in str(step.get("comment", ""))
        default = "runtime" if own else "base"
        names.append(next((stage for text, stage in _STAGES if own and text in command), default))
    first = names.index("python") if "python" in names else 0
    return ["base"] * first + names[first:]


def _read_head(tar: tarfile.TarFile) -> tuple[bytes, list[str], list[dict[str, Any]]]:
    """Return the configuration of an image, its layers' members, and the step of each layer."""
    try:
        config, members = _find_parts(tar)
        history = json.loads(config).get("history", [])
        return config, members, [step for step in history if not step.get("empty_layer")]
    # The JSON is invalid, or has another structure than expected, or several images.
    except (ValueError, TypeError, AttributeError) as error:
        raise tarfile.ReadError(f"its manifest is not that of an image: {error}") from error


def _find_parts(tar: tarfile.TarFile) -> tuple[bytes, list[str]]:
    """Find the configuration and the layers' members, by manifest.json or by OCI's index.json."""
    names = set(tar.getnames())
    if "manifest.json" in names:
        manifest = _only_image(_json(tar, "manifest.json"))
        return _read(tar, manifest["Config"]), list(manifest["Layers"])
    blob = _only_image(_json(tar, "index.json")["manifests"])
    for _ in range(2):
        found = _json(tar, _blob(blob))
        if "layers" in found:
            return _read(tar, _blob(found["config"])), [_blob(layer) for layer in found["layers"]]
        blob = _only_image(found["manifests"])
    raise KeyError("layers")


def _only_image(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the one image of a list; attestations are of the platform unknown/unknown."""
    found = [m for m in manifests if (m.get("platform") or {}).get("os") != "unknown"]
    if len(found) != 1:
        raise ValueError(f"found {len(found)} images, needed one")
    return found[0]


def _blob(descriptor: dict[str, str]) -> str:
    return "blobs/" + descriptor["digest"].replace(":", "/")


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    member = tar.extractfile(name)
    if member is None:
        raise KeyError(name)
    return member.read()


def _json(tar: tarfile.TarFile, name: str) -> Any:
    return json.loads(_read(tar, name))


@contextmanager
def _open_layer(tar: tarfile.TarFile, name: str) -> Iterator[BinaryIO]:
    """Open a layer as a plain seekable tar."""
    stored = tar.extractfile(name)
    if stored is None:
        raise KeyError(name)
    start = stored.read(4)
    stored.seek(0)
    if start[:2] != b"\x1f\x8b" and start != b"\x28\xb5\x2f\xfd":
        yield cast(BinaryIO, stored)
        return
    with tempfile.TemporaryFile() as unpacked:
        source: Any = gzip.GzipFile(fileobj=stored) if start[:2] == b"\x1f\x8b" else None
        source = source or zstandard.ZstdDecompressor().stream_reader(stored)
        shutil.copyfileobj(source, unpacked, _CHUNK)
        unpacked.seek(0)
        yield cast(BinaryIO, unpacked)


def _entries(stream: BinaryIO) -> Iterator[Entry]:
    with tarfile.open(fileobj=stream, mode="r:") as layer:
        for member in layer:
            path = re.sub(r"^(\./|/)+", "", member.name).rstrip("/")
            if path in ("", "."):
                continue

            def opens(member: tarfile.TarInfo = member) -> BinaryIO:
                return cast(BinaryIO, layer.extractfile(member))

            yield Entry(
                path=path,
                bytes=member.size,
                mode=member.mode,
                kind=_KINDS.get(member.type, "device"),
                open=opens,
                target=member.linkname,
            )


def _is_whiteout(file: File) -> bool:
    return file.path.rpartition("/")[2].startswith(".wh.")


def _hide_files(files: list[File], layer: list[File]) -> Iterator[File]:
    """Yield the files of earlier layers, those that a layer replaces or deletes as not visible."""
    deleted: set[str] = set()
    replaced: set[str] = set()
    for entry in layer:
        folder, _, name = entry.path.rpartition("/")
        if name == ".wh..wh..opq":
            deleted.add(folder)
        elif name.startswith(".wh."):
            deleted.add(f"{folder}/{name[4:]}".lstrip("/"))
        elif entry.kind == "folder":
            replaced.add(entry.path)
        else:
            deleted.add(entry.path)
    for file in files:
        parts = file.path.split("/")
        # From the root, "", which a whiteout can empty too.
        above = ("/".join(parts[:count]) for count in range(len(parts) + 1))
        hidden = file.visible and (
            any(path in deleted for path in above)
            or (file.kind != "folder" and file.path in replaced)
        )
        yield replace(file, visible=False) if hidden else file

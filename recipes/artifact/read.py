"""Read an image or a wheelhouse into an Artifact: an archive, an unpacked folder, or wheels."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from attnimg.errors import AttnimgError
from recipes.artifact.archive import read_archive
from recipes.artifact.entries import Entry, read_entry
from recipes.artifact.facts import Artifact, File, FileKind, Kind, Layer
from recipes.artifact.layout import compress
from recipes.artifact.packages import find_distributions
from recipes.files import sha256_of_file

Log = Callable[[str], None]

SUMS, _MANIFEST = "SHA256SUMS", "manifest.json"
# A line of it; `sha256sum -b` writes a star before the name.
SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")
# The errors of a damaged wheel. RuntimeError: a file in it is encrypted, or compressed by what this
# Python can't read.
DAMAGED_WHEEL = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


def read_image(path: Path, *, log: Log, blobs: Path | None = None) -> Artifact:
    """Read an image: an unpacked folder, or a file of `docker save` or an OCI tool.

    Args:
        path: of the folder or file.
        log: called with a line of text before each layer is read.
        blobs: a folder for the compressed layers of a file; None keeps none.

    Raises:
        AttnimgError: it is neither, or not there (code "bad-archive").
    """
    if not path.exists():
        raise AttnimgError(
            f"there is no {path}",
            why="found nothing there to read",
            do="name a file of `docker save`, or the folder of an unpacked image",
            code="bad-archive",
        )
    if path.is_dir():
        log(f"folder {path}")
        files = tuple(read_entry(entry, layer=0) for entry in _list_folder(path))
        # The compressed size is not known: the folder does not show where the layers were.
        layer = Layer(name="folder", made_by="", bytes=sum(file.bytes for file in files))
        layers: tuple[Layer, ...] = (layer,)
        kind: Kind = "folder"
        config, env = b"", dict[str, str]()
    else:
        layers, files, config = read_archive(path, log=log, blobs=blobs)
        kind = "image"
        variables = (json.loads(config).get("config") or {}).get("Env") or []
        env = dict(text.partition("=")[::2] for text in variables)
    return Artifact(
        source=path.name,
        kind=kind,
        layers=layers,
        files=files,
        distributions=find_distributions(files),
        env=env,
        config=config,
    )


def read_wheelhouse(folder: Path, *, over: Artifact | None, log: Log) -> Artifact:
    """Read a wheelhouse, as if installed over an image if one is given.

    Raises:
        AttnimgError: there is no wheel in it, or one is invalid.
    """
    log(f"wheels {folder}")
    layers, files = _read_wheels(folder, site=_site_packages(over) if over else "")
    sums, manifest = _read_sums(folder)
    installed = {file.path for file in files}
    below = [file for file in over.files if file.visible] if over else []
    return Artifact(
        source=folder.name,
        kind="wheels",
        layers=layers,
        files=files,
        distributions=find_distributions(files),
        sums=sums,
        manifest=manifest,
        below=tuple(file for file in below if file.path not in installed),
    )


def _site_packages(image: Artifact) -> str:
    """Return the folder with the most packages; empty for none."""
    sites = [package.folder.rpartition("/")[0] for package in image.distributions]
    return max(sorted(set(sites)), key=sites.count, default="")


def _read_wheels(folder: Path, *, site: str) -> tuple[tuple[Layer, ...], tuple[File, ...]]:
    """Read every wheel of a folder as a layer of the files that it installs.

    Args:
        folder: of *.whl.
        site: the path of site-packages that they are installed into; empty for none.

    Raises:
        AttnimgError: there is no wheel, or one is invalid.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise AttnimgError(
            f"{folder} is not a wheelhouse", why="found no *.whl in it", do="make wheels/NAME"
        )
    layers, files = [], []
    for place, wheel in enumerate(wheels):
        try:
            with zipfile.ZipFile(wheel) as archive:
                files += [read_entry(entry, layer=place) for entry in _list_wheel(archive, site)]
        except DAMAGED_WHEEL as error:
            raise AttnimgError(
                f"{wheel.name} is not a wheel", why=str(error), do="make wheels/NAME again"
            ) from error
        with wheel.open("rb") as stream:
            compressed = compress(stream)
        size = wheel.stat().st_size
        layers.append(Layer(name=wheel.name, made_by="", bytes=size, zstd_bytes=compressed.bytes))
    return tuple(layers), tuple(files)


def _read_sums(folder: Path) -> tuple[dict[str, bool], dict[str, object]]:
    """Compare each file with SHA256SUMS, and read manifest.json; a missing file is empty."""
    sums: dict[str, bool] = {}
    if (folder / SUMS).is_file():
        for line in (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines():
            entry = SUM.fullmatch(line)
            name = entry[2] if entry else line
            path = folder / name
            sums[name] = bool(entry and path.is_file() and sha256_of_file(path) == entry[1])
    for path in folder.glob("*.whl"):
        sums.setdefault(path.name, False)
    manifest: Any = {}
    if (folder / _MANIFEST).is_file():
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        except ValueError:
            sums[_MANIFEST] = False
    return sums, manifest if isinstance(manifest, dict) else {}


def _list_folder(root: Path) -> Iterator[Entry]:
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder) / name
            status = path.lstat()
            yield Entry(
                path=str(path.relative_to(root)),
                bytes=status.st_size if stat.S_ISREG(status.st_mode) else 0,
                mode=status.st_mode,
                kind=_kind(status.st_mode),
                open=partial(_open, path),
                target=str(path.readlink()) if path.is_symlink() else "",
            )


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def _kind(mode: int) -> FileKind:
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "device"


def _list_wheel(archive: zipfile.ZipFile, site: str) -> Iterator[Entry]:
    for member in archive.infolist():
        if member.is_dir():
            continue
        path = member.filename
        top, _, rest = path.partition("/")
        if top.endswith(".data") and rest.startswith(("purelib/", "platlib/")):
            path = rest.partition("/")[2]
        yield Entry(
            path=f"{site}/{path}".lstrip("/"),
            bytes=member.file_size,
            mode=(member.external_attr >> 16) & 0o7777 or 0o644,
            kind="file",
            open=partial(_open_member, archive, member),
        )


def _open_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> BinaryIO:
    """Unpack a member to a temporary file: seeking back in a member is slow."""
    with archive.open(member) as stored, ExitStack() as opened:
        copy = opened.enter_context(tempfile.TemporaryFile())
        shutil.copyfileobj(stored, copy, 1 << 20)
        copy.seek(0)
        opened.pop_all()  # the caller closes it
        return cast(BinaryIO, copy)

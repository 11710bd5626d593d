"""The values that gates check: the layers, files, machine code and packages of an artifact.

Paths are relative to the image's root ("opt/venv/bin/python"); in a wheelhouse without an image,
to site-packages. Sizes are bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["image", "folder", "wheels"]
FileKind = Literal["file", "link", "hardlink", "folder", "device"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Symbol:
    """A symbol that a file needs from others; `version` is empty if any version will do."""

    name: str
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.version}" if self.version else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Elf:
    """One ELF file.

    Attributes:
        machine: "EM_X86_64", "EM_AARCH64", "EM_CUDA", "EM_AMDGPU".
        soname: the name by which others need it; empty for none.
        needed: sonames of the libraries it needs.
        search: folders that are searched for them first; $ORIGIN is its own folder.
        defines: symbols it defines, each as "name", and as "name@version" where it has one.
        undefined: symbols that others must define; weak ones are left out.
        versions_defined: versions it defines; empty for none.
        versions_needed: soname -> versions it needs of that library.
        codes: GPU machine code inside: "sm_90a", "compute_90" (PTX), "gfx942".
        section_codes: those of them in the sections for GPU code.
        cuobjdump_codes: the same as cuobjdump lists them; None if it did not.
        faults: parts that could not be read.
    """

    machine: str
    soname: str = ""
    needed: tuple[str, ...] = ()
    search: tuple[str, ...] = ()
    defines: frozenset[str] = frozenset()
    undefined: tuple[Symbol, ...] = ()
    versions_defined: frozenset[str] = frozenset()
    versions_needed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    codes: frozenset[str] = frozenset()
    section_codes: frozenset[str] = frozenset()
    cuobjdump_codes: frozenset[str] | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One entry of one layer.

    Attributes:
        layer: index into the artifact's layers.
        mode: permission bits, setuid and sticky ones too.
        target: of a symbolic or hard link, as stored.
        visible: whether a container sees it at this path; if not, a later layer hides it, but it
            is still shipped.
        digest: sha256; empty unless it is an ELF file.
        secrets: kinds of secrets that it seems to have: "private key".
        text: of a package's metadata; empty elsewhere.
    """

    path: str
    layer: int
    bytes: int
    mode: int
    kind: FileKind = "file"
    target: str = ""
    visible: bool = True
    digest: str = ""
    elf: Elf | None = None
    secrets: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One layer, or one wheel.

    Attributes:
        name: the stage of the Dockerfile it comes from; a wheel's file name.
        made_by: the command in the image's history; empty for a wheel.
        bytes: of the tar, or of the wheel.
        zstd_bytes: compressed with zstd -3; None if that was not measured.
        digest: of the compressed layer, sha256:...; empty for a folder.
    """

    name: str
    made_by: str
    bytes: int
    zstd_bytes: int | None = None
    digest: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """An installed Python package.

    Attributes:
        name: as PEP 503 spells it.
        folder: its dist-info folder.
        licence: as in its metadata; empty if they have none.
        files: paths of the files that its metadata list.
    """

    name: str
    version: str
    folder: str
    licence: str = ""
    files: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """The content of an image, an unpacked folder or a wheelhouse.

    Attributes:
        source: name of the file or folder that was read.
        files: of all layers, in order.
        distributions: those that a container sees.
        env: variables of the image's configuration.
        config: the image's configuration as it is stored; its sha256 is the image's ID.
        sums: wheel -> whether its hash is that of SHA256SUMS; for a wheelhouse only.
        manifest: manifest.json of a wheelhouse; None for others.
        below: visible files of the image over which a wheelhouse is installed.
        sbom: package -> version as an SBOM tool found it; None if it was not run.
    """

    source: str
    kind: Kind
    layers: tuple[Layer, ...]
    files: tuple[File, ...]
    distributions: tuple[Distribution, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    config: bytes = b""
    sums: Mapping[str, bool] = field(default_factory=dict)
    manifest: Mapping[str, object] | None = None
    below: tuple[File, ...] = ()
    sbom: Mapping[str, str] | None = None

    @property
    def image_id(self) -> str:
        """The ID of the image: the digest of its configuration."""
        return f"sha256:{hashlib.sha256(self.config).hexdigest()}"


def visible_elves(files: Iterable[File]) -> Iterator[tuple[File, Elf]]:
    """Yield the ELF files that a container sees, each with its content."""
    for file in files:
        if file.visible and file.elf is not None:
            yield file, file.elf


def stage_sizes(artifact: Artifact) -> dict[str, float]:
    """Return the compressed size of the layers of each stage, in MB; empty if one is not known."""
    sizes: dict[str, float] = {}
    for layer in artifact.layers:
        if layer.zstd_bytes is None:
            return {}
        sizes[layer.name] = sizes.get(layer.name, 0.0) + layer.zstd_bytes / 1e6
    return sizes

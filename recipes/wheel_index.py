"""Write a wheelhouse as a package index of static files, from which pip and uv install.

    OUT/simple/KERNEL/index.html    PEP 503 and 658, for any web server
    OUT/simple/KERNEL/index.json    PEP 691, for a server that chooses by the Accept header
    OUT/files/WHEEL, WHEEL.metadata
    OUT/requirements.txt            all kernels by hash, for pip install --require-hashes

Own code: the two templates are shorter than the adapter to a library that writes them.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import shutil
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from urllib.parse import quote

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from attnimg.errors import AttnimgError
from recipes.artifact.read import DAMAGED_WHEEL, SUM, SUMS
from recipes.files import sha256_of_file

_PAGE = """<!DOCTYPE html>
<html>
<head><meta name="pypi:repository-version" content="1.1"><title>{title}</title></head>
<body>
{links}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexedWheel:
    """A wheel of the index: its file, its hash, and the METADATA in it."""

    path: Path
    package: str
    version: str
    sha256: str
    size: int
    requires_python: str
    metadata: bytes


def write_index(name: str, wheels: Path, out: Path, *, base_url: str = "") -> list[IndexedWheel]:
    """Write the index of a wheelhouse, in place of an existing one.

    Args:
        name: the image's.
        wheels: the wheelhouse, dist/NAME.
        out: the folder of the index.
        base_url: where the files will be; empty for OUT/files.

    Raises:
        AttnimgError: the wheelhouse has no wheels, a small (trimmed) build, a wheel that is not
            valid, two versions of a package, or a wheel whose hash is not in SHA256SUMS; or the
            folder of the index has other files.
    """
    found = read_wheels(name, wheels)
    _refuse_other_files(out)
    shutil.rmtree(out, ignore_errors=True)
    (out / "files").mkdir(parents=True)
    for wheel in found:
        (out / "files" / f"{wheel.path.name}.metadata").write_bytes(wheel.metadata)
        _link(wheel.path, out / "files" / wheel.path.name)
    names = sorted({wheel.package for wheel in found})
    for package in names:
        own = [wheel for wheel in found if wheel.package == package]
        folder = out / "simple" / package
        folder.mkdir(parents=True)
        links = "\n".join(_link_text(wheel, base_url) for wheel in own)
        (folder / "index.html").write_text(_PAGE.format(title=package, links=links), "utf-8")
        (folder / "index.json").write_text(_json(package, own, base_url), "utf-8")
    links = "\n".join(f'<a href="{package}/">{package}</a><br>' for package in names)
    (out / "simple" / "index.html").write_text(_PAGE.format(title=name, links=links), "utf-8")
    projects = {"meta": {"api-version": "1.1"}, "projects": [{"name": text} for text in names]}
    (out / "simple" / "index.json").write_text(json.dumps(projects, indent=1) + "\n", "utf-8")
    # One line for each package, of which pip takes the wheel that fits.
    pins: dict[str, str] = {}
    for wheel in found:
        pin = f"{wheel.package}=={wheel.version}"
        pins[pin] = f"{pins.get(pin, pin)} --hash=sha256:{wheel.sha256}"
    (out / "requirements.txt").write_text("".join(f"{text}\n" for text in pins.values()), "utf-8")
    return found


def _refuse_other_files(out: Path) -> None:
    """Check that a folder is missing, empty, or an index that was written here."""
    if not out.is_symlink() and (not out.exists() or out.is_dir()):
        other = {path.name for path in out.iterdir()} if out.exists() else set()
        if not other - {"simple", "files", "requirements.txt"}:
            return
        why = f"found {', '.join(sorted(other)[:3])} in {out}, which would be removed"
    else:
        why = f"{out} is no folder"
    raise AttnimgError(
        f"the index can't be written into {out}",
        why=f"{why}; needed a new or empty folder, or an index that was written here",
        do="name another folder with --to",
        code="not-an-index",
    )


def read_wheels(name: str, folder: Path) -> list[IndexedWheel]:
    """Read the wheels of a wheelhouse, and compare them with its SHA256SUMS.

    Raises:
        AttnimgError: as write_index.
    """
    sums_file = folder / SUMS
    paths = sorted(folder.glob("*.whl"))
    if not sums_file.is_file() or not paths:
        raise AttnimgError(
            f"there are no wheels of {name} to index",
            why=f"found {len(paths)} wheels in {folder}, "
            f"and {'a' if sums_file.is_file() else 'no'} SHA256SUMS; needed both",
            do=f"make wheels/{name}; an image without kernels has no index",
            code="no-wheels",
        )
    lines = sums_file.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [SUM.fullmatch(line) for line in lines]
    sums = {entry[2]: entry[1] for entry in entries if entry}
    faults = [
        f"SHA256SUMS has {line[:80]!r}, needed a hash and a name"
        for line, entry in zip(lines, entries, strict=True)
        if not entry
    ]
    faults += [f"{file} is missing" for file in sums if not (folder / file).is_file()]
    found = []
    for path in paths:
        if not path.is_file():
            faults.append(f"{path.name} is no file")
            continue
        digest = sha256_of_file(path)
        if sums.get(path.name) != digest:
            faults.append(f"{path.name}: the hash {digest} is not in SHA256SUMS")
            continue
        try:
            found.append(_read_wheel(path, digest))
        except (ValueError, KeyError, *DAMAGED_WHEEL) as error:
            faults.append(f"{path.name} is not a wheel: {type(error).__name__}: {error}")
    faults += [
        f"{wheel.path.name} is a small build (TRIM=1)"
        for wheel in found
        if "trim" in wheel.version.partition("+")[2]
    ]
    versions: dict[str, set[str]] = {}
    for wheel in found:
        versions.setdefault(wheel.package, set()).add(wheel.version)
    faults += [
        f"found {package} {' and '.join(sorted(several))}, needed one version"
        for package, several in versions.items()
        if len(several) > 1
    ]
    if faults:
        raise AttnimgError(
            f"the wheels of {name} can't be published",
            why="\n".join(faults),
            do=f"make wheels/{name} again, without TRIM",
            code="wrong-wheels",
        )
    return found


def _read_wheel(path: Path, digest: str) -> IndexedWheel:
    name, version, _, _ = parse_wheel_filename(path.name)
    with zipfile.ZipFile(path) as archive:
        [file] = [
            entry
            for entry in archive.namelist()
            if entry.endswith(".dist-info/METADATA") and entry.count("/") == 1
        ]
        metadata = archive.read(file)
    headers = Parser().parsestr(metadata.decode("utf-8", "replace"), headersonly=True)
    if canonicalize_name(headers["Name"] or "") != name:
        raise ValueError(f"its METADATA is for {headers['Name']}")
    if Version(headers["Version"] or "") != version:
        raise ValueError(f"its METADATA is for version {headers['Version']}")
    return IndexedWheel(
        path=path,
        package=name,
        version=str(version),
        sha256=digest,
        size=path.stat().st_size,
        requires_python=headers["Requires-Python"] or "",
        metadata=metadata,
    )


def _link(source: Path, target: Path) -> None:
    """Make a file available at another path: a hard link, or a copy on another disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _url(wheel: IndexedWheel, base_url: str) -> str:
    # Relative to OUT/simple/KERNEL/.
    return f"{(base_url or '../../files').rstrip('/')}/{quote(wheel.path.name)}"


def _link_text(wheel: IndexedWheel, base_url: str) -> str:
    core = f"sha256={hashlib.sha256(wheel.metadata).hexdigest()}"
    attributes = {
        "href": f"{_url(wheel, base_url)}#sha256={wheel.sha256}",
        "data-core-metadata": core,
        # PEP 714: the old name, for pip before 23.2.
        "data-dist-info-metadata": core,
        "data-requires-python": wheel.requires_python,
    }
    text = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return f"<a{text}>{html.escape(wheel.path.name)}</a><br>"


def _json(package: str, wheels: list[IndexedWheel], base_url: str) -> str:
    files = [
        {
            "filename": wheel.path.name,
            "url": _url(wheel, base_url),
            "hashes": {"sha256": wheel.sha256},
            "core-metadata": {"sha256": hashlib.sha256(wheel.metadata).hexdigest()},
            "size": wheel.size,
            **({"requires-python": wheel.requires_python} if wheel.requires_python else {}),
        }
        for wheel in wheels
    ]
    content = {
        "meta": {"api-version": "1.1"},
        "name": package,
        "versions": sorted({wheel.version for wheel in wheels}),
        "files": files,
    }
    return json.dumps(content, indent=1) + "\n"

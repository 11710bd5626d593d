"""Merge the wheels of single kernels into the wheelhouse of an image: a folder of dist/.

A wheelhouse is replaced as a whole, in one step: a run that is killed leaves the old one or the new
one. The wheels of other kernels stay in it if they are what the recipes of this checkout build.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wheelhouse

# Source: linux/fs.h and linux/fcntl.h, as renameat2(2) names them.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class MergeError(Exception):
    """A wheel can't be merged; the argument is the reason."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the recipes of this checkout build for an image.

    Attributes:
        image: its name.
        abi: what a compiled extension must match.
        keys: kernel -> the key of its recipe, in order of installation.
        small: the kernels whose small build is wanted (TRIM=1).
    """

    image: str
    abi: str
    keys: Mapping[str, str]
    small: frozenset[str]


def wanted_wheels(files: str, *, trim: bool) -> Wanted:
    """Read what is built for an image; with `trim`, the small builds of kernels that have one.

    Args:
        files: the name of its files: "hopper", or "hopper-arm64" for that platform.
        trim: whether TRIM is set.
    """
    folder = Path("docker/images") / files
    content = json.loads((folder / "wheelhouse.json").read_text(encoding="utf-8"))
    builds = {
        name: json.loads((folder / f"kernels/{name}.json").read_text(encoding="utf-8"))
        for name in content["kernels"]
    }
    small = frozenset(name for name, build in builds.items() if trim and build["trim_env"])
    return Wanted(image=content["image"], abi=content["abi"], keys=content["kernels"], small=small)


def kept_kernels(folder: Path, wanted: Wanted) -> tuple[dict[str, Any], list[str]]:
    """Return the reports of the kernels of a wheelhouse that can stay, and why others can't."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return {}, []
    try:
        reports = json.loads(manifest.read_text(encoding="utf-8"))["kernels"]
        named = {str(report["name"]): dict(report) for report in reports}
    except (ValueError, TypeError, KeyError) as error:
        return {}, [f"no wheel of {folder} is kept: its manifest.json can't be read ({error})"]
    kept, dropped = {}, []
    for name, report in named.items():
        if reason := _why_not_kept(folder, report, wanted):
            dropped.append(f"{name} is not kept: {reason}")
        else:
            kept[name] = report
    return kept, dropped


def _why_not_kept(folder: Path, report: Mapping[str, Any], wanted: Wanted) -> str:
    """Return why a kernel of a wheelhouse can't stay in it; empty if it can."""
    name, wheel = str(report["name"]), folder / Path(str(report.get("wheel", ""))).name
    if name not in wanted.keys:
        return f"it is not a kernel of {wanted.image}"
    if report.get("key") != wanted.keys[name]:
        return f"it was built from recipe {report.get('key')}, now {wanted.keys[name]}"
    if bool(report.get("trimmed")) != (name in wanted.small):
        return "it is a small build" if report.get("trimmed") else "it is not the small build"
    if not wheel.is_file() or wheelhouse.digest(wheel) != report.get("sha256"):
        return "its wheel was changed or removed"
    return ""


def missing_kernels(folder: Path, wanted: Wanted) -> list[str]:
    """Return the kernels that a wheelhouse lacks, in order of installation."""
    kept, _ = kept_kernels(folder, wanted)
    return [name for name in wanted.keys if name not in kept]


def merge(folder: Path, made: Path | None, wanted: Wanted) -> list[str]:
    """Put the wheel of one kernel into a wheelhouse; return a sentence on each wheel not kept.

    Args:
        folder: the wheelhouse, which need not exist.
        made: a folder with the wheel and the report of one kernel, as docker/kernel/build.py writes
            them; None only removes what can't stay.
        wanted: what the image's recipe builds.

    Raises:
        MergeError: the new wheel is not what the recipe builds.
    """
    new = _read_new(made, wanted) if made else {}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent):
        _recover(folder)
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        kept, dropped = kept_kernels(folder, wanted)
        for name, report in {**kept, **new}.items():
            source = made if made and name in new else folder
            shutil.copyfile(source / report["wheel"], part / report["wheel"])
            text = json.dumps(report, indent=1) + "\n"
            (part / f"{name}.json").write_text(text, encoding="utf-8")
        wheelhouse.write(part, wanted.image, wanted.abi)
        _replace(folder, part)
        shutil.rmtree(part, ignore_errors=True)
    return [text for text in dropped if text.partition(" ")[0] not in new]


def _read_new(made: Path, wanted: Wanted) -> dict[str, Any]:
    """Return the report of a new wheel: kernel -> report."""
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(made.glob("*.json"))]
    if len(reports) != 1:
        raise MergeError(f"found {len(reports)} reports in {made}, needed one")
    if reason := _why_not_kept(made, reports[0], wanted):
        raise MergeError(f"{reports[0]['name']}: {reason}")
    return {reports[0]["name"]: reports[0]}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other run merges into a wheelhouse of this folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(folder: Path, part: Path) -> None:
    """Put `part` in the place of `folder`, in one step where the file system can exchange them."""
    if not folder.exists():
        part.rename(folder)
        return
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(folder), os.fsencode(part)
    exchange = getattr(libc, "renameat2", None)
    if exchange and exchange(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    replace_in_two_steps(folder, part)


def replace_in_two_steps(folder: Path, part: Path) -> None:
    """Put `part` in the place of `folder`; a run that is killed between leaves FOLDER.old."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)


def recover(folder: Path) -> None:
    """Restore a wheelhouse that a killed run had moved away; wait for a run that replaces it."""
    if folder.parent.is_dir():
        with _locked(folder.parent):
            _recover(folder)


def _recover(folder: Path) -> None:
    if not folder.exists() and _old(folder).exists():
        _old(folder).rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")

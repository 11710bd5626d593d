"""Read the TOML files of recipes/, and refuse every key and value that is not known."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import TypeAdapter, ValidationError

from attnimg.errors import AttnimgError
from recipes.facts import (
    PLATFORMS,
    Allowance,
    Base,
    Cve,
    Image,
    Kernel,
    Patch,
    Recipes,
    Toolkit,
    Torch,
    Unresolved,
    VersionPair,
)

_Fact = TypeVar("_Fact")


def read_recipes(root: Path) -> Recipes:
    """Read every recipe of a checkout.

    Args:
        root: the folder that holds recipes/ and pyproject.toml.

    Raises:
        AttnimgError: a file is not TOML, or has an unknown key or an invalid value; or there is no
            folder recipes/.
    """
    folder = root / "recipes"
    if not folder.is_dir():
        raise AttnimgError(
            f"{root} is not a checkout of attnimg",
            why="found no folder recipes/ in it",
            do="name the folder that holds recipes/ and pyproject.toml",
            code="no-checkout",
        )
    bases = _read_bases(folder / "bases.toml")
    first = next(iter(bases.values()))
    images: dict[str, Image] = {}
    for path in sorted((folder / "images").glob("*.toml")):
        for image in read_image(path.stem, _text(path, "recipes/images")):
            name = image.base or first.name
            python = bases.get(name, first).python
            images[image.name] = replace(image, base=name, python=python)
    kernels = {
        path.stem: replace(
            read_kernel(path.stem, _text(path, "recipes/kernels")),
            patches=read_patches(folder / "patches" / path.stem),
        )
        for path in sorted((folder / "kernels").glob("*.toml"))
    }
    return Recipes(
        images=images,
        kernels=kernels,
        torch=_read_releases(folder / "torch.toml", Torch),
        cuda=_read_releases(folder / "cuda.toml", Toolkit),
        stack=_read_pins(root / "pyproject.toml"),
        pairs=_read_entries(folder / "pairs.toml", "pair", VersionPair),
        bases=bases,
        allowed=_read_entries(folder / "allowed.toml", "allowed", Allowance),
        cves=_read_entries(folder / "cves.toml", "cve", Cve),
    )


def read_image(name: str, text: str) -> tuple[Image, ...]:
    """Read one image, and its frontier variant where it has one.

    Raises:
        AttnimgError: as read_recipes.
    """
    where = f"recipes/images/{name}.toml"
    values = _toml(where, text)
    _refuse(where, _forbid(values, "name", "channel"))
    if "python" in values:
        _refuse(where, ["python: it is that of the base, in recipes/bases.toml; remove it here"])
    frontier = values.pop("frontier", None)
    if isinstance(values.get("kernels"), list):
        values["kernels"] = [{"name": k} if isinstance(k, str) else k for k in values["kernels"]]
    image = _build(where, Image, {"name": name, **values})
    _refuse(where, image_faults(image))
    if frontier is None:
        return (image,)
    if not isinstance(frontier, str):
        _refuse(where, [f"frontier: found {frontier!r}, needed a release of torch"])
    return image, replace(
        image, name=f"{name}-frontier", aliases=(), channel="frontier", torch=frontier
    )


def read_kernel(name: str, text: str) -> Kernel:
    """Read one kernel package.

    Raises:
        AttnimgError: as read_recipes.
    """
    where = f"recipes/kernels/{name}.toml"
    values = _toml(where, text)
    _refuse(where, _forbid(values, "name", "patches"))
    kernel = _build(where, Kernel, {"name": name, **values})
    _refuse(where, kernel_faults(kernel))
    return kernel


def read_patches(folder: Path) -> tuple[Patch, ...]:
    """Read the patches of one kernel, those of its small build last.

    Raises:
        AttnimgError: a file has no reason above its diff, or no diff.
    """
    patches = []
    for path in [*sorted(folder.glob("*.patch")), *sorted(folder.glob("trim/*.patch"))]:
        name = path.relative_to(folder).as_posix()
        where = f"recipes/patches/{folder.name}"
        reason, mark, diff = _text(path, where).partition("--- a/")
        if not reason.strip() or not mark:
            _refuse(f"{where}/{name}", ["found no reason above a unified diff of a/ and b/"])
        patches.append(Patch(name=name, reason=" ".join(reason.split()), diff=mark + diff))
    return tuple(patches)


def _text(path: Path, folder: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _error(f"{folder}/{path.name}", [str(error.strerror)]) from error
    except UnicodeDecodeError as error:
        raise _error(f"{folder}/{path.name}", [f"it is not UTF-8: {error}"]) from error


def _read_toml(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a file of recipes/; return its name in messages, and its tables."""
    where = f"recipes/{path.name}"
    return where, _toml(where, _text(path, "recipes"))


def _toml(where: str, text: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = _unresolved(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise _error(where, [str(error)]) from error
    return table


def _unresolved(values: Any) -> Any:
    """Replace each {unresolved = "reason"} by an Unresolved."""
    if isinstance(values, dict):
        if set(values) == {"unresolved"} and isinstance(values["unresolved"], str):
            return Unresolved(values["unresolved"])
        return {key: _unresolved(value) for key, value in values.items()}
    return [_unresolved(value) for value in values] if isinstance(values, list) else values


def _build(where: str, kind: type[_Fact], values: Mapping[str, Any]) -> _Fact:
    """Build a dataclass from a table; raise all errors of the table together."""
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        lines = [_describe(dict(fault), known) for fault in error.errors()]
        raise _error(where, lines) from error


def _forbid(values: Mapping[str, Any], *keys: str) -> Iterator[str]:
    """Yield keys that a file may not set, since their values come from elsewhere."""
    yield from (f"{key}: unknown key" for key in keys if key in values)


def _describe(fault: dict[str, Any], known: list[str]) -> str:
    """Return an error of pydantic as a line of text."""
    path = [str(part) for part in fault["loc"] if part != "Unresolved"]
    key = ".".join(path)
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        close = difflib.get_close_matches(path[-1], known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key}: missing"
    return f"{key}: found {fault['input']!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _read_bases(path: Path) -> dict[str, Base]:
    where, tables = _read_toml(path)
    found = {}
    for name, values in tables.items():
        table = values if isinstance(values, dict) else {}
        found[name] = _build(f"{where} [{name}]", Base, {"name": name, **table})
        _refuse(f"{where} [{name}]", base_faults(found[name]))
    if not found:
        _refuse(where, ["found no base image, needed at least one"])
    return found


def _read_releases(path: Path, kind: type[_Fact]) -> dict[str, _Fact]:
    where, tables = _read_toml(path)
    found = {}
    for name, values in tables.items():
        found[name] = release = _build(f"{where} [{name}]", kind, values)
        if isinstance(release, Torch):
            _refuse(f"{where} [{name}]", torch_faults(name, release))
    try:
        return dict(sorted(found.items(), key=lambda item: Version(item[0])))
    except InvalidVersion as error:
        raise _error(where, [str(error)]) from error


def _read_entries(path: Path, key: str, kind: type[_Fact]) -> tuple[_Fact, ...]:
    where, values = _read_toml(path)
    entries = values.pop(key, [])
    _refuse(where, [f"{other}: unknown key; needed [[{key}]]" for other in values])
    if not isinstance(entries, list):
        _refuse(where, [f"{key}: found a table, needed [[{key}]]"])
    return tuple(_build(f"{where} [[{key}]]", kind, values) for values in entries)


def _read_pins(path: Path) -> dict[str, str]:
    """Read the dependencies of the trainer that pyproject.toml pins exactly."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    needs = project["optional-dependencies"]["train"]
    pinned = (text.partition("==") for text in needs if "==" in text)
    return {name.strip(): version.strip() for name, _, version in pinned}


def _refuse(where: str, faults: Iterable[str]) -> None:
    """Raise all the faults of one file together, if there are any."""
    if lines := list(faults):
        raise _error(where, lines)


def _error(where: str, lines: Iterable[str]) -> AttnimgError:
    return AttnimgError(
        f"{where} is not a valid recipe",
        why="\n".join(lines),
        do=f"correct {where}; recipes/facts.py explains each key",
        code="bad-recipe",
    )


_ARCH = re.compile(r"cpu|sm_[1-9][0-9]{1,2}[af]?|gfx[1-9][0-9a-f]{2,3}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# The registry has a dot or a port: `docker.io/library/python:3.11`, `127.0.0.1:5000/python:3.11`.
_REFERENCE = re.compile(r"[\w-]*[.:][\w.:-]*(/[\w.-]+)+:[\w.-]+")
_RELEASE = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.!+]+")
_COMMIT = re.compile(r"[A-Za-z0-9][\w-]*/[\w.-]+@[0-9a-f]{40}")
_HEADS = re.compile(r"[1-9]\d*/[1-9]\d*")


def image_faults(image: Image) -> Iterator[str]:
    """Yield what is wrong with the values of an image's file."""
    yield from _arch_faults("archs", image.archs)
    for choice in image.kernels:
        yield from _arch_faults(f"kernels.{choice.name}.archs", choice.archs)
    if not image.archs:
        yield "archs: found none, needed at least one"
    platforms = [platform for platform in PLATFORMS if platform in image.platforms]
    if list(image.platforms) != platforms or not platforms:
        found = " ".join(image.platforms) or "none"
        yield f"platforms: found {found}, needed each once, in this order: {' '.join(PLATFORMS)}"


def base_faults(base: Base) -> Iterator[str]:
    """Yield what is wrong with the values of a base image."""
    digests = {f"platforms.{key}": digest for key, digest in base.platforms.items()}
    if isinstance(base.digest, str):
        digests["digest"] = base.digest
    for key, digest in digests.items():
        if not _DIGEST.fullmatch(digest):
            yield f"{key}: found {digest!r}, needed sha256: and 64 hexadecimal digits"
    if not _REFERENCE.fullmatch(base.reference):
        yield f"reference: found {base.reference!r}, needed registry/name:tag, without a digest"


def torch_faults(version: str, torch: Torch) -> Iterator[str]:
    """Yield what is wrong with the CPU build of a torch release."""
    for name, hashes in (torch.cpu.wheels if torch.cpu else {}).items():
        if not name.startswith(f"torch-{version}+cpu-") or not name.endswith(".whl"):
            yield f"cpu.wheels: found {name!r}, needed torch-{version}+cpu-...whl"
        if not hashes:
            yield f"cpu.wheels.{name}: found no hash, needed at least one"
        for text in () if isinstance(hashes, Unresolved) else hashes:
            if not _SHA256.fullmatch(text):
                yield f"cpu.wheels.{name}: found {text!r}, needed 64 hexadecimal digits"


def kernel_faults(kernel: Kernel) -> Iterator[str]:
    """Yield what is wrong with the values of a kernel's file."""
    yield from _arch_faults("archs", tuple(kernel.archs))
    if _RELEASE.fullmatch(kernel.source):
        if kernel.sha256 is None:
            yield f"sha256: missing; {kernel.source} needs its archive's, or an `unresolved` reason"
        elif isinstance(kernel.sha256, str) and not _SHA256.fullmatch(kernel.sha256):
            yield f"sha256: found {kernel.sha256!r}, needed 64 hexadecimal digits"
        if not kernel.source.endswith(f"=={kernel.version}"):
            yield f"source: found {kernel.source!r}, but version is {kernel.version!r}"
    elif not _COMMIT.fullmatch(kernel.source):
        yield f"source: found {kernel.source!r}, needed name==version or owner/name@40-digit commit"
    if (kernel.form == "git") != bool(_COMMIT.fullmatch(kernel.source)):
        yield f"form: found {kernel.form!r} for {kernel.source!r}"
    for wheel in kernel.prebuilt:
        if not _SHA256.fullmatch(wheel.sha256):
            yield f"prebuilt.sha256: found {wheel.sha256!r}, needed 64 hexadecimal digits"
        if not wheel.abi and kernel.abi == "torch":
            yield f"prebuilt.abi: missing; {wheel.source} is bound to a torch and a Python"
    for path, source in kernel.submodules.items():
        if not _COMMIT.fullmatch(source):
            yield f"submodules.{path}: found {source!r}, needed owner/name@40-digit commit"
    for key, text in (("torch", kernel.torch), ("python", kernel.python), ("nvcc", kernel.nvcc)):
        yield from _specifier_faults(key, text)
    for name, text in kernel.beside.items():
        yield from _specifier_faults(f"beside.{name}", text)
    yield from _ahead_of_time_faults(kernel)
    for head_dim, pairs in (kernel.triton.heads if kernel.triton else {}).items():
        for pair in pairs:
            if not _HEADS.fullmatch(pair):
                yield f"triton.heads.{head_dim}: found {pair!r}, needed query/key-value heads: 32/8"
    for text in kernel.requires:
        try:
            Requirement(text)
        except InvalidRequirement:
            yield f"requires: found {text!r}, needed a pip requirement"


def _ahead_of_time_faults(kernel: Kernel) -> Iterator[str]:
    """Check the kernels to compile when an image is built: each architecture has a target."""
    kernel_set = kernel.ahead_of_time
    if kernel_set is None:
        return
    for arch in sorted(set(kernel.archs) ^ set(kernel_set.targets)):
        yield f"ahead_of_time.targets.{arch}: needed for each of archs, and for no other"
    for model in kernel_set.models:
        where = f"ahead_of_time.models: {model.model}"
        if model.source not in kernel_set.sources:
            yield f"{where}: found source {model.source!r}, needed one of ahead_of_time.sources"
        if model.kv_heads < 1 or model.heads % model.kv_heads:
            yield f"{where}: found {model.heads} heads for {model.kv_heads} kv_heads"
    names = [model.model for model in kernel_set.models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"ahead_of_time.models: {name} is listed more than once"


def _arch_faults(key: str, archs: tuple[str, ...]) -> Iterator[str]:
    for arch in archs:
        if not _ARCH.fullmatch(arch):
            yield f"{key}: found {arch!r}, needed cpu, sm_NN[a], sm_NNN[a] or gfxNNN"


def _specifier_faults(key: str, text: str) -> Iterator[str]:
    try:
        SpecifierSet(text)
    except InvalidSpecifier:
        yield f"{key}: found {text!r}, needed a version bound such as >=2.10"

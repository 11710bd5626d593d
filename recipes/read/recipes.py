"""Read the TOML files into facts, and refuse every key and value that is not known."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from packaging.version import InvalidVersion, Version
from pydantic import TypeAdapter, ValidationError

from attnimg.errors import AttnimgError
from recipes.facts import (
    Allowance,
    Base,
    Image,
    Kernel,
    Pair,
    Patch,
    Recipes,
    Toolkit,
    Torch,
    Unresolved,
)
from recipes.read.values import base_faults, image_faults, kernel_faults

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
            f"{root} is no checkout of attnimg",
            why="found no folder recipes/ in it",
            do="name the folder that holds recipes/ and pyproject.toml",
            code="no-checkout",
        )
    images: dict[str, Image] = {}
    for path in sorted((folder / "images").glob("*.toml")):
        for image in read_image(path.stem, path.read_text(encoding="utf-8")):
            images[image.name] = image
    kernels = {
        path.stem: replace(
            read_kernel(path.stem, path.read_text(encoding="utf-8")),
            patches=read_patches(folder / "patches" / path.stem),
        )
        for path in sorted((folder / "kernels").glob("*.toml"))
    }
    return Recipes(
        images=images,
        kernels=kernels,
        torch=_releases(folder / "torch.toml", Torch),
        cuda=_releases(folder / "cuda.toml", Toolkit),
        stack=_pins(root / "pyproject.toml"),
        pairs=_entries(folder / "pairs.toml", "pair", Pair),
        bases=_bases(folder / "bases.toml"),
        allowed=_entries(folder / "allowed.toml", "allowed", Allowance),
    )


def read_image(name: str, text: str) -> tuple[Image, ...]:
    """Read one image, and its frontier variant where it has one.

    Raises:
        AttnimgError: as read_recipes.
    """
    where = f"recipes/images/{name}.toml"
    values = _toml(where, text)
    _refuse(where, _computed(values, "name", "channel"))
    frontier = values.pop("frontier", None)
    if isinstance(values.get("kernels"), list):
        values["kernels"] = [{"name": k} if isinstance(k, str) else k for k in values["kernels"]]
    image = _facts(where, Image, {"name": name, **values})
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
    _refuse(where, _computed(values, "name", "patches"))
    kernel = _facts(where, Kernel, {"name": name, **values})
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
        reason, mark, diff = path.read_text(encoding="utf-8").partition("--- a/")
        if not reason.strip() or not mark:
            where = f"recipes/patches/{folder.name}/{name}"
            _refuse(where, ["found no reason above a unified diff of a/ and b/"])
        patches.append(Patch(name=name, reason=" ".join(reason.split()), diff=mark + diff))
    return tuple(patches)


def _toml(where: str, text: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = _unresolved(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        _refuse(where, [str(error)])
        raise
    return table


def _unresolved(values: Any) -> Any:
    """Replace each {unresolved = "reason"} by an Unresolved."""
    if isinstance(values, dict):
        if set(values) == {"unresolved"} and isinstance(values["unresolved"], str):
            return Unresolved(values["unresolved"])
        return {key: _unresolved(value) for key, value in values.items()}
    return [_unresolved(value) for value in values] if isinstance(values, list) else values


def _facts(where: str, kind: type[_Fact], values: Mapping[str, Any]) -> _Fact:
    """Build a dataclass from a table; raise all errors of the table together."""
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # all are dataclasses
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        _refuse(where, [_fault(dict(fault), known) for fault in error.errors()])
        raise


def _computed(values: Mapping[str, Any], *keys: str) -> Iterator[str]:
    """Yield keys that a file may not set, since their values come from elsewhere."""
    yield from (f"{key}: unknown key" for key in keys if key in values)


def _fault(fault: dict[str, Any], known: list[str]) -> str:
    place = [str(part) for part in fault["loc"] if part != "Unresolved"]
    key = ".".join(place)
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(place[-1], known, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if fault["type"] in ("missing", "missing_argument"):
        return f"{key}: missing"
    return f"{key}: found {fault['input']!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _tables(path: Path, kind: type[_Fact]) -> dict[str, _Fact]:
    where = f"recipes/{path.name}"
    return {
        name: _facts(f"{where} [{name}]", kind, values)
        for name, values in _toml(where, path.read_text(encoding="utf-8")).items()
    }


def _bases(path: Path) -> dict[str, Base]:
    found = _tables(path, Base)
    for name, base in found.items():
        _refuse(f"recipes/{path.name} [{name}]", base_faults(base))
    return found


def _releases(path: Path, kind: type[_Fact]) -> dict[str, _Fact]:
    where = f"recipes/{path.name}"
    found = _tables(path, kind)
    try:
        return dict(sorted(found.items(), key=lambda item: Version(item[0])))
    except InvalidVersion as error:
        _refuse(where, [str(error)])
        raise


def _entries(path: Path, key: str, kind: type[_Fact]) -> tuple[_Fact, ...]:
    where = f"recipes/{path.name}"
    entries = _toml(where, path.read_text(encoding="utf-8")).get(key, [])
    return tuple(_facts(f"{where} [[{key}]]", kind, values) for values in entries)


def _pins(path: Path) -> dict[str, str]:
    """Read the dependencies of the trainer that pyproject.toml pins exactly."""
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    needs = project["optional-dependencies"]["train"]
    pinned = (text.partition("==") for text in needs if "==" in text)
    return {name.strip(): version.strip() for name, _, version in pinned}


def _refuse(where: str, faults: Iterable[str]) -> None:
    """Raise all the faults of one file together, if there are any."""
    lines = list(faults)
    if lines:
        raise AttnimgError(
            f"{where} is not a recipe",
            why="\n".join(lines),
            do=f"correct {where}; recipes/facts.py says what each key means",
            code="bad-recipe",
        )

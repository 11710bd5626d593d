"""Raise unless the packages of the extra attnimg[train] are installed, in versions it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from attnimg.errors import AttnimgError


def require_trainer() -> None:
    """Raise unless `attnimg train` has the packages that it needs.

    Where attnimg runs from a folder and is not installed, nothing is known about its extra, and
    nothing is checked.

    Raises:
        AttnimgError: code trainer-not-installed.
    """
    try:
        listed = requires("attnimg") or []
    except PackageNotFoundError:
        return
    needed = train_only(listed)
    found = {}
    for need in needed:
        try:
            found[need.name] = version(need.name)
        except PackageNotFoundError:
            continue
    require_versions(needed, found)


def train_only(requirements: Sequence[str]) -> list[Requirement]:
    """Return the requirements of the extra "train", of those in a distribution's metadata."""
    parsed = [Requirement(text) for text in requirements]
    return [
        need
        for need in parsed
        if need.marker
        and need.marker.evaluate({"extra": "train"})
        and not need.marker.evaluate({"extra": ""})
    ]


def require_versions(needed: Sequence[Requirement], found: Mapping[str, str]) -> None:
    """Raise unless every needed package is among those found, in an allowed version.

    Args:
        needed: the requirements of the extra.
        found: installed packages, name -> version.

    Raises:
        AttnimgError: code trainer-not-installed.
    """
    wrong = [
        f"found {f'{need.name} {found[need.name]}' if need.name in found else f'no {need.name}'}; "
        f"needed {need.name}{need.specifier}"
        for need in needed
        if need.name not in found or not need.specifier.contains(found[need.name], prereleases=True)
    ]
    if wrong:
        raise AttnimgError(
            "the packages of `attnimg train` are not installed",
            why="\n".join(wrong),
            do="pip install 'attnimg[train]', in a virtual environment without other trainers",
            code="trainer-not-installed",
            exit_code=1,
        )

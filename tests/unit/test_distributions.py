"""A package that an image's virtual environment only declares is not the one that is imported."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from attnimg.distributions import distribution, distributions, version
from attnimg.machine.host import this_host

NAME = "attnimg-test-package"


def write(site: Path, version: str, *, installer: str) -> None:
    info = site / f"{NAME.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {version}\n")
    if installer:
        (info / "INSTALLER").write_text(f"{installer}\n")


@pytest.fixture
def sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folders of the added packages and of the image's own, in the order of sys.path."""
    added, own = tmp_path / "added", tmp_path / "own"
    for folder in (added, own):
        folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(added), str(own), *sys.path])
    write(own, "2.13.0", installer="pip")
    return added, own


def test_a_declaration_stands_for_the_package_in_the_image(sites: tuple[Path, Path]) -> None:
    added, own = sites
    write(added, "2.13.0", installer="attnimg")
    assert version(NAME) == "2.13.0"
    assert Path(str(distribution(NAME).locate_file(""))) == own
    assert this_host().installed[NAME] == "2.13.0"


# Python lists a folder in any order, so that one of the two is found by luck alone.
@pytest.mark.parametrize("other", ["0.1", "9.9"])
@pytest.mark.parametrize("installer", ["pip", "uv", ""])
def test_another_version_beside_its_declaration_is_found(
    sites: tuple[Path, Path], other: str, installer: str
) -> None:
    added, _ = sites
    write(added, "2.13.0", installer="attnimg")
    write(added, other, installer=installer)
    assert version(NAME) == other
    assert this_host().installed[NAME] == other
    found = [one.version for one in distributions() if one.name == NAME]
    assert found == [other, "2.13.0"]


def test_a_declaration_alone_is_no_package(sites: tuple[Path, Path]) -> None:
    added, own = sites
    write(added, "2.13.0", installer="attnimg")
    next(own.iterdir()).rename(own / "gone")
    assert NAME not in this_host().installed
    with pytest.raises(metadata.PackageNotFoundError):
        version(NAME)

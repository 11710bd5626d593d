"""docker/added/image_venv.py: what it declares, for pip, uv, attnimg and the gates."""

from __future__ import annotations

import runpy
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from attnimg.distributions import DECLARED

PROGRAM = Path(__file__).parents[3] / "docker/added/image_venv.py"


@pytest.fixture
def declared(tmp_path: Path) -> dict[str, PathDistribution]:
    """The declarations of an image with torch, a library of CUDA and rich; name -> declaration."""
    own, site, fixed = tmp_path / "own", tmp_path / "site", tmp_path / "constraint.txt"
    site.mkdir()
    fixed.write_text("# Generated\ntorch==2.13.0+cpu\nnvidia-cublas-cu13==1.0\n")
    for name, version in (
        ("torch", "2.13.0+cpu"), ("nvidia_cublas_cu13", "1.0"), ("rich", "15.0.0"),
    ):  # fmt: skip
        info = own / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(f"{name}/__init__.py,,\n{info.name}/RECORD,,\n")
        (info / "INSTALLER").write_text("pip\n")
    program = runpy.run_path(str(PROGRAM))
    program["declare_packages"].__globals__["FIXED"] = fixed
    program["declare_packages"](own, site)
    found = [PathDistribution(path) for path in site.iterdir()]
    return {one.name: one for one in found}


def test_no_installer_can_uninstall_what_may_not_be_replaced(
    declared: dict[str, PathDistribution],
) -> None:
    """Without RECORD, pip and uv refuse: tests/image/test_child_images.py runs both."""
    for name in ("torch", "nvidia_cublas_cu13"):
        assert declared[name].read_text("RECORD") is None


def test_another_declaration_is_removed_whole_and_nothing_of_the_image_with_it(
    declared: dict[str, PathDistribution],
) -> None:
    record = declared["rich"].read_text("RECORD") or ""
    listed = {line.partition(",")[0] for line in record.splitlines()}
    info = declared["rich"]._path.name  # type: ignore[attr-defined]
    there = {f"{info}/{path.name}" for path in declared["rich"]._path.iterdir()}  # type: ignore[attr-defined]
    assert listed == there


def test_every_declaration_is_marked(declared: dict[str, PathDistribution]) -> None:
    assert {one.version for one in declared.values()} == {"2.13.0+cpu", "1.0", "15.0.0"}
    assert {one.read_text("INSTALLER") for one in declared.values()} == {f"{DECLARED}\n"}

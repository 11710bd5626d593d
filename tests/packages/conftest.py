"""These tests read packages that `make test/packages` downloads."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _downloaded() -> None:
    if "WHEELS" not in os.environ:
        pytest.skip("WHEELS names no folder of packages: run `make test/packages`")


@pytest.fixture(scope="module")
def axolotl_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Make axolotl's modules of prompts importable, without an installation."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("axolotl", "addict", "colorama"):
        wheels = list(Path(os.environ["WHEELS"]).glob(f"{name}-*.whl"))
        if not wheels:
            pytest.skip(f"the folder WHEELS has no {name}: run `make test/templates`")
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))

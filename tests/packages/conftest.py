"""These tests read packages that `make test/packages` downloads."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _downloaded() -> None:
    if "WHEELS" not in os.environ:
        pytest.skip("WHEELS names no folder of packages: run `make test/packages`")

"""Tests that travel in every image: `attnimg selftest` runs them, with nothing from outside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MANIFEST = Path("/opt/attnimg/image.json")


@pytest.fixture(scope="session")
def image() -> dict[str, Any]:
    """What this image was built as."""
    return json.loads(MANIFEST.read_text())


@pytest.fixture(scope="session")
def offline() -> dict[str, str]:
    """An environment in which nothing can be fetched, and losses are the same on every machine."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

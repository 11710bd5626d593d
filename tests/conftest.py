"""What every test run has: a cache of its own for proofs, so that nobody's own cache is touched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("ATTNIMG_CACHE")
    os.environ["ATTNIMG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ATTNIMG_CACHE"]
    else:
        os.environ["ATTNIMG_CACHE"] = before

"""Set a separate cache of proofs for each test run, and run the slowest files first."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# The slowest files, in this order. They run first, so that no process of `make test` still runs one
# when the others are done.
LONGEST = [
    "test_wrong_kernels.py", "test_torchrun.py", "test_verify_command.py",
    "test_kill_and_resume.py", "test_command.py", "test_attention_check.py", "test_contexts.py",
    "test_reload.py", "test_wrong_kernels_combined.py", "test_watchdog.py", "test_process_state.py",
    "test_runner.py", "test_family_runs.py", "test_noisy_kernels.py",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the tests of LONGEST to the front."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("ATTNIMG_CACHE")
    os.environ["ATTNIMG_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ATTNIMG_CACHE"]
    else:
        os.environ["ATTNIMG_CACHE"] = before

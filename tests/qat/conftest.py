"""Tests of qat need torchao, which `make test/qat` installs into build/qat."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "fixtures"))
import tiny_run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fail in words where torchao is missing: a skip would leave qat untested."""
    try:
        version("torchao")
    except PackageNotFoundError:
        if items:
            pytest.exit("torchao is not installed: run make test/qat", returncode=2)


@pytest.fixture(autouse=True)
def machine_with_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiny runs find the package, as a real machine's probe does."""
    machine = replace(tiny_run.CPU, packages={"torch": "2", "torchao": version("torchao")})
    monkeypatch.setattr(tiny_run, "CPU", machine)

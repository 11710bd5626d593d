"""docker/install/elf.py: what the loader reads of a library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pydantic_core
import pytest

INSTALL = Path(__file__).resolve().parents[2] / "docker/install"


def said(call: str) -> str:
    """Run a function of it as prune.py does, beside it; give what it returns."""
    done = subprocess.run(
        [sys.executable, "-c", f"import elf; from pathlib import Path; print(elf.{call})"],
        cwd=INSTALL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "has"),
    [
        pytest.param(numpy, True, id="numpy's wheels are not stripped"),
        pytest.param(pydantic_core, False, id="pydantic's are"),
    ],
)
def test_what_is_stripped_is_not_stripped_again(package: ModuleType, has: bool) -> None:
    folder = Path(str(package.__file__)).parent
    library = next(folder.rglob("_*.so"))
    assert said(f"has_symbol_table(Path('{library}'))") == str(has)

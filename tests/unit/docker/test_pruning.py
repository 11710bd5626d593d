"""docker/install/elf.py: what the loader reads of a library, seen and edited."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy
import pydantic_core
import pytest

from recipes.artifact.elf import read_elf
from recipes.artifact.facts import Elf

INSTALL = Path(__file__).resolve().parents[3] / "docker/install"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of a real library that asks for several."""
    (original,) = (Path(numpy.__file__).parent / "_core").glob("_multiarray_umath.*.so")
    return Path(shutil.copy(original, tmp_path))


def call(expression: str) -> str:
    """Call a function of elf.py from its folder, as prune.py does; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import elf; from pathlib import Path; print(elf.{expression})"],
        cwd=INSTALL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def read(path: Path) -> Elf:
    with path.open("rb") as stream:
        return read_elf(stream)


def test_a_library_asks_no_longer_for_the_one_that_is_dropped(library: Path) -> None:
    before = read(library)
    dropped, *kept = before.needed
    assert call(f"drop_needed(Path('{library}'), '{dropped}')") == f"['{dropped}']"
    after = read(library)
    assert after.needed == tuple(kept)
    assert (after.undefined, after.defines, after.search) == (
        before.undefined,
        before.defines,
        before.search,
    )
    assert not after.faults


def test_a_library_that_does_not_ask_for_it_is_not_written_to(library: Path) -> None:
    """Writing would store it in one more layer."""
    library.chmod(0o400)
    was = library.stat().st_mtime_ns
    assert call(f"drop_needed(Path('{library}'), 'libcurand.so')") == "[]"
    assert library.stat().st_mtime_ns == was


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
    assert call(f"has_symbol_table(Path('{library}'))") == str(has)


def rules(folder: Path, accelerator: str) -> dict[str, list[object]]:
    """Read the rules as prune.py does with those files mounted."""
    code = (
        "import json, prune; from dataclasses import asdict; from pathlib import Path; "
        f"prune.RULES = Path({str(folder)!r}); "
        f"print(json.dumps(asdict(prune.read_rules({accelerator!r}))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=INSTALL, capture_output=True, text=True, check=True
    )
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "rocm"])
def test_a_layer_has_its_own_rules_and_each_has_a_reason(tmp_path: Path, accelerator: str) -> None:
    shutil.copy(INSTALL / "unneeded/torch.toml", tmp_path)
    torch = rules(tmp_path, accelerator)
    every = rules(INSTALL / "unneeded", accelerator)
    assert {"torch/include", "**/tests"} <= {glob for glob, _ in torch["remove"]}
    assert not [glob for glob, _ in torch["remove"] if glob.startswith("pyarrow")]
    assert all(reason for _, reason in every["remove"])
    assert len(torch["unlink"]) == (1 if accelerator == "cuda" else 0)
    for key in torch:
        assert len(every[key]) >= len(torch[key])


def test_a_table_of_rules_has_a_name_that_is_read() -> None:
    names = {"strip", "every_image", "cpu", "cuda", "rocm", "cuda_unlink"}
    for path in (INSTALL / "unneeded").glob("*.toml"):
        assert set(tomllib.loads(path.read_text())) <= names

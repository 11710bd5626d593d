"""Backends are found by their files, which import no torch; LOCAL_KERNELS has one order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from run_facts import a_backend, a_problem

from attnimg import backends
from attnimg.backends import all_backends, local_kernel_repo
from attnimg.backends._transformers import flash_name
from attnimg.backends.s2 import group_kernels
from attnimg.facts import Arch, LocalKernel, Machine
from attnimg.selection.judge import judge
from attnimg.verification.proofs import has_dense_function

FLASH = "kernels-community/flash-attn2"
FOLDER = Path(__file__).parents[2] / "fixtures" / "flash_attn2"
AVAILABLE = "transformers.modeling_flash_attention_utils.is_flash_attn_2_available"
PACKAGES = {"flash-attn": "2.8.3", "kernels": "0.17.2"}


def test_no_file_of_a_backend_imports_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import attnimg.backends as backends\n"
        "from importlib import import_module\n"
        "from pkgutil import iter_modules\n"
        "names = [file.name for file in iter_modules(backends.__path__) if file.name[0] != '_']\n"
        "assert {'hub', 'sdpa', 's2', 'flash_attention_4'} <= {*names}, names\n"
        "[import_module(f'attnimg.backends.{name}') for name in names]\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_holds_one_backend_or_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    head = "from dataclasses import replace\n"
    head += "from attnimg.backends.flex_attention import BACKEND as E\n"
    (tmp_path / "zz_one.py").write_text(head + "BACKEND = replace(E, name='one', rank=-1)\n")
    (tmp_path / "zz_two.py").write_text(
        head + "BACKENDS = [replace(E, name=n, rank=r) for n, r in (('b', 999), ('a', -2))]\n"
    )
    (tmp_path / "_zz_shared.py").write_text("raise AssertionError('a shared file has no backend')")
    before = [backend.name for backend in all_backends()]
    monkeypatch.setattr(backends, "__path__", [*backends.__path__, str(tmp_path)])
    found = [backend.name for backend in all_backends.__wrapped__()]
    assert found == ["a", "one", *before, "b"]
    for name in ("zz_one", "zz_two"):
        sys.modules.pop(f"attnimg.backends.{name}")


@pytest.mark.parametrize(
    ("name", "installed", "served", "repo"),
    [
        pytest.param("flash_attention_2", (), (FLASH,), FLASH, id="in place of a package"),
        pytest.param("flash_attention_2", PACKAGES, (FLASH,), None, id="an installed one is first"),
        pytest.param("flash_attention_2", (), (), None, id="nothing is served"),
        pytest.param("flash_attention_2", (), ("org/other",), None, id="another kernel is served"),
        pytest.param("sdpa", (), ("",), None, id="a served name that is empty"),
        pytest.param("sdpa", (), (FLASH,), None, id="a backend that no kernel stands in for"),
        pytest.param(FLASH, PACKAGES, (FLASH,), FLASH, id="a kernel that the config names"),
        pytest.param(f"{FLASH}@v1", PACKAGES, (FLASH,), FLASH, id="its revision does not matter"),
        pytest.param(f"{FLASH}:flash_attn_func", PACKAGES, (FLASH,), FLASH, id="nor its function"),
    ],
)
def test_what_local_kernels_serves_is_taken(
    name: str, installed: Any, served: Any, repo: str | None
) -> None:
    assert local_kernel_repo(a_backend(name), installed=installed, local_repos=served) == repo


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "not installed"])
def test_the_plan_the_proof_and_the_call_take_the_same_kernel(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    """The package where it is installed, else the folder, whose kernel has no dense entry."""
    backend = a_backend("flash_attention_2")
    kernel = LocalKernel(
        repo=FLASH, path=str(FOLDER), vendor="nvidia", version="9",
        exports=frozenset({"flash_attn_varlen_func"}),
    )  # fmt: skip
    machine = Machine(
        arch=Arch(name="sm_90", vendor="nvidia", capability=(9, 0)), gpu="h100", torch="2.13.0",
        packages=PACKAGES if installed else {}, local_kernels=(kernel,),
    )  # fmt: skip
    verdict = judge(backend, machine, a_problem(dtype="bfloat16"), rank=1)
    assert verdict.kernel is not None
    assert verdict.kernel.startswith("flash-attn 2.8.3" if installed else f"{FLASH} 9 from")
    assert has_dense_function(backend, machine) == installed

    monkeypatch.setenv("LOCAL_KERNELS", f"{FLASH}={FOLDER}")
    monkeypatch.setattr(AVAILABLE, lambda: installed)
    package = SimpleNamespace(flash_attn_varlen_func=lambda: None)
    if installed:
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert flash_name(backend) == ("flash_attention_2" if installed else FLASH)
    (groups, *_) = group_kernels()
    assert (groups.function.varlen is package.flash_attn_varlen_func) == installed

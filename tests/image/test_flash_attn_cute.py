"""flash-attn as attnimg builds it can't shadow or break FlashAttention-4, in whatever order.

Both ship flash_attn/cute/: stock flash-attn 2.8.3 brings 20 files of an old FlashAttention-4. Each
sequence below broke one of them with stock wheels (2026-11-21). The wheels are built here as the
images build them, from the sdists, removals and patches of the recipes; flash-attn without its CUDA
library, for which an empty module stands in. Needs a package index, no image, no GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

UV = Path(sys.executable).with_name("uv")
WITHOUT_CUDA = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"}
LOOK = Path(__file__).with_name("look_at_kernels.py")


def run(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program that has to succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "SETUPTOOLS_SCM_IGNORE_VCS_ROOTS": str(ROOT), **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both wheels with docker/kernel and the builds of the hopper image."""
    folder = tmp_path_factory.mktemp("kernels")
    run(sys.executable, "-m", "venv", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--require-hashes", "-r", ROOT / "docker/tools.txt")
    # flash-attn's setup.py asks torch for its version.
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
    for number, name in (("2", "flash-attn"), ("4", "flash-attn-4"), ("stock", "flash-attn")):
        temp = folder / number
        temp.mkdir()
        build = json.loads((ROOT / f"docker/images/hopper/kernels/{name}.json").read_text())
        # Only what has no CUDA.
        build |= {"env": WITHOUT_CUDA, "arch_variable": ""}
        if number == "stock":
            build["remove"] = []
        (temp / "kernel.json").write_text(json.dumps(build))
        paths = {"WHEELS": str(temp / "wheels"), "TMPDIR": str(temp)}
        paths["PATCHES"] = str(ROOT / "recipes/patches" / name)
        paths["PYTHONPATH"] = str(ROOT / "docker")
        run(python, "-m", "kernel.build", temp / "kernel.json", **paths)
    return {path.parents[1].name: path for path in folder.glob("*/wheels/*.whl")}


class InstallVenv:
    """A venv in which the two are installed and removed."""

    def __init__(self, folder: Path, wheels: dict[str, Path]) -> None:
        self.wheels, self.venv = wheels, folder / "venv"
        run(UV, "venv", "-q", "--python", sys.executable, self.venv)
        self.python = self.venv / "bin" / "python"
        self.site = next(self.venv.glob("lib/python*/site-packages"))
        (self.site / "flash_attn_2_cuda.py").touch()
        self.other = folder / "other"

    def do(self, step: str) -> None:
        """Do one step: pip +2 / +24 / ++4 / -2 / +stock, uv +24, rm, or other +2."""
        tool, _, what = step.partition(" ")
        pip = (sys.executable, "-m", "pip", "--python", self.python)
        install = ["install", "--no-deps", "--no-index"]
        names = ["stock"] if what == "+stock" else [name for name in what if name.isdigit()]
        wanted = [self.wheels[name] for name in names]
        match tool, what[:1]:
            case "rm", _:
                shutil.rmtree(self.site / "flash_attn" / "cute", ignore_errors=True)
            case "pip", "-":
                run(*pip, "uninstall", "-y", {"-2": "flash-attn", "-4": "flash-attn-4"}[what])
            case "pip", _:
                again = ["--force-reinstall"] if what.startswith("++") else []
                run(*pip, *install, *again, *wanted)
            case "uv", _:
                run(UV, "pip", *install, "--python", self.python, *wanted)
            case _:
                run(sys.executable, "-m", "pip", *install, "--target", self.other, *wanted)

    def look(self) -> dict[str, Any]:
        """Return what is found with the probe that `attnimg doctor` uses."""
        return json.loads(run(self.python, LOOK, PYTHONPATH=f"{self.other}:{ROOT}").stdout)


@pytest.mark.parametrize(
    ("steps", "there"),
    [
        pytest.param(["pip +2", "pip +4"], "24", id="2 then 4"),
        pytest.param(["pip +2", "pip +4", "pip -4"], "2", id="4 removed again"),
        pytest.param(["pip +4", "pip +2"], "24", id="4 then 2"),
        pytest.param(["pip +4", "pip +2", "pip ++4"], "24", id="4 then 2, 4 reinstalled"),
        pytest.param(["pip +4", "pip +2", "pip -2"], "4", id="4 then 2, 2 removed again"),
        pytest.param(["pip +24"], "24", id="both in one pip command"),
        pytest.param(["uv +24"], "24", id="both in one uv command"),
        pytest.param(["pip +2", "rm", "pip +4"], "24", id="cute deleted in between"),
        pytest.param(["pip +2", "rm", "pip +4", "pip ++2"], "24", id="2 upgraded last"),
        pytest.param(["pip +4"], "4", id="4 alone"),
    ],
)
def test_no_order_breaks_either(
    tmp_path: Path, wheels: dict[str, Path], steps: list[str], there: str
) -> None:
    place = InstallVenv(tmp_path, wheels)
    for step in steps:
        place.do(step)
    found = place.look()
    assert found["damaged"] == {}, "every file is there, with its recorded hash"
    assert found["shadows"] == {}
    assert found["owners"] == (["flash-attn-4"] if "4" in there else [])
    assert found["found"]["flash_attn.cute.interface"] == ("4" in there)
    assert found["found"]["flash_attn.flash_attn_interface"] == ("2" in there)


def test_stock_flash_attn_does_break_it_and_is_found(
    tmp_path: Path, wheels: dict[str, Path]
) -> None:
    place = InstallVenv(tmp_path, wheels)
    for step in ("pip +4", "pip +stock"):
        place.do(step)
    found = place.look()
    assert found["owners"] == ["flash-attn", "flash-attn-4"]
    assert len(found["damaged"]["flash-attn-4"]) >= 19


def test_deleting_cute_from_an_installed_tree_is_found(
    tmp_path: Path, wheels: dict[str, Path]
) -> None:
    place = InstallVenv(tmp_path, wheels)
    for step in ("pip +2", "pip +4", "rm"):
        place.do(step)
    assert list(place.look()["damaged"]) == ["flash-attn-4"]


def test_2_in_another_folder_of_sys_path_is_found(tmp_path: Path, wheels: dict[str, Path]) -> None:
    place = InstallVenv(tmp_path, wheels)
    place.do("pip +4")
    place.do("other +2")
    shadows = place.look()["shadows"]
    assert list(shadows) == ["flash_attn"]

"""docker/image_files.py: what each Python of an image runs when it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnimg.machine.container import SET_FOR
from attnimg.machine.threads import SET_HERE, SPINS_IDLE

ROOT = Path(__file__).parents[3]
CPUS = len(os.sched_getaffinity(0))
SHOW = "import json, os, sys; print(json.dumps([dict(os.environ), sorted(sys.modules)]))"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages with the .pth file of an image."""
    code = "import sys; sys.path[:0] = ['docker']; import image_files; print(image_files.AT_START)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "attnimg_container.pth").write_text(done.stdout)
    return folder


def start(
    site: Path, environment: Mapping[str, str], *, cpus: set[int] | None = None, code: str = SHOW
) -> tuple[dict[str, str], set[str]]:
    """Return the environment and the modules of a Python that starts with the .pth file."""
    minimal = {"PATH": os.environ["PATH"], "HOME": "/dev/null/home", "PYTHONPATH": str(ROOT),
               "ATTNIMG_CACHE": str(site.parent / "cache")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", f"import site; site.addsitedir({str(site)!r})\n{code}"],
        preexec_fn=lambda: os.sched_setaffinity(0, cpus or os.sched_getaffinity(0)),
        cwd=site.parent, env={**minimal, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    environment, modules = json.loads(done.stdout)
    return environment, set(modules)


def test_a_program_gets_folders_and_threads(site: Path) -> None:
    seen, modules = start(site, {})
    assert seen["HF_HOME"].startswith(str(site.parent / "cache"))
    assert 1 <= int(seen["OMP_NUM_THREADS"]) <= CPUS
    # Also on a busy machine: measuring the load would delay each start of Python.
    assert seen["GOMP_SPINCOUNT"] == str(SPINS_IDLE)
    slow = {"dataclasses", "inspect", "shutil", "subprocess", "attnimg.errors"}
    assert not slow & modules, "each would add milliseconds to each start of Python"


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_of_the_user_are_kept(site: Path, variable: str) -> None:
    seen, _ = start(site, {variable: "7"})
    assert {name: seen.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")} == {
        "OMP_NUM_THREADS": None, "MKL_NUM_THREADS": None, variable: "7",
    }  # fmt: skip
    again, _ = start(site, {**seen, "LOCAL_WORLD_SIZE": "2"})
    assert again[variable] == "7"


def test_a_child_with_the_same_cpus_imports_nothing(site: Path) -> None:
    seen, modules = start(site, {})
    assert "attnimg.machine.container" in modules
    again, modules = start(site, seen)
    assert "attnimg" not in modules
    assert again == seen


def test_a_worker_of_torchrun_gets_its_part(site: Path) -> None:
    parent, _ = start(site, {})
    worker, _ = start(site, {**parent, "LOCAL_WORLD_SIZE": parent["OMP_NUM_THREADS"]})
    assert worker["OMP_NUM_THREADS"] == "1"
    assert worker["HF_HOME"] == parent["HF_HOME"]


def test_a_child_with_fewer_cpus_has_fewer_threads(site: Path) -> None:
    parent, _ = start(site, {})
    child, _ = start(site, parent, cpus={min(os.sched_getaffinity(0))})
    assert child["OMP_NUM_THREADS"] == "1"
    assert child[SET_FOR] == f"{os.geteuid()} 1 "


def test_how_threads_wait_is_inherited_from_the_entrypoint(site: Path) -> None:
    parent, _ = start(site, {})
    busy = parent | {
        "GOMP_SPINCOUNT": "3000",
        SET_HERE: parent[SET_HERE].replace(f"={SPINS_IDLE}", "=3000"),
        "LOCAL_WORLD_SIZE": "64",
    }
    child, _ = start(site, busy)
    assert (child["OMP_NUM_THREADS"], child["GOMP_SPINCOUNT"]) == ("1", "3000")
    assert child[SET_HERE] == "OMP_NUM_THREADS=1 GOMP_SPINCOUNT=3000"


@pytest.mark.parametrize("name", ["attnimg_added.pth", "z_added.pth"])
def test_the_order_of_the_pth_files_does_not_matter(site: Path, tmp_path: Path, name: str) -> None:
    """Packages in /opt/added come first on sys.path, in either order."""
    added = tmp_path / "added"
    packages = added / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = packages / "site-packages"
    packages.mkdir(parents=True)
    (packages / "mine.py").write_text("")
    (added / "pyvenv.cfg").write_text("")
    (added / "tested.txt").write_text("")
    text = (ROOT / "docker/added/attnimg_added.py").read_text()
    text = text.replace('"/opt/added"', repr(str(added)))
    text = text.replace('"/etc/pip/tested.txt"', repr(str(added / "tested.txt")))
    (site / "attnimg_added.py").write_text(text)
    (site / name).write_text((ROOT / "docker/added/attnimg_added.pth").read_text())
    seen, modules = start(site, {}, code=f"import mine\n{SHOW}")
    assert {"mine", "attnimg_added", "attnimg.machine.container"} <= modules
    assert "OMP_NUM_THREADS" in seen


@pytest.mark.parametrize(
    ("image", "machine", "name", "torchao"),
    [
        pytest.param("hopper", "x86_64", "hopper", True, id="the first platform"),
        pytest.param("hopper-arm64", "aarch64", "hopper", False, id="another platform"),
        pytest.param(
            "blackwell-frontier-arm64", "aarch64", "blackwell-frontier", False, id="a frontier"
        ),
    ],
)
def test_the_manifest_has_the_recipe_of_its_platform(
    monkeypatch: pytest.MonkeyPatch, image: str, machine: str, name: str, *, torchao: bool
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docker")
    import image_files

    found, recipe = image_files.recipe_of(image, machine)
    platform = "linux/arm64" if machine == "aarch64" else "linux/amd64"
    assert found == name
    assert recipe["platforms"] == list(recipe["abi"]) == [platform]
    kernels = {kernel["name"]: kernel["keys"] for kernel in recipe["kernels"]}
    assert ("torchao" in kernels) == torchao
    assert all(list(keys) == [platform] for keys in kernels.values())


def test_an_image_is_not_finished_on_a_platform_that_its_recipe_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "docker")
    import image_files

    with pytest.raises(SystemExit, match="ampere is for linux/amd64, found linux/arm64"):
        image_files.recipe_of("ampere-arm64", "aarch64")

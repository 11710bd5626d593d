"""The CPU build of torch: by its own name and hash, from real package indexes and folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import serve_files

ROOT = Path(__file__).parents[3]
CPU = "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl"
CUDA = "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl"
FETCH = "from torch_wheel import torch_wheel; print(torch_wheel('cpu', 'cpu'))"


def write_wheel(path: Path, *, note: str = "") -> str:
    """Write a small wheel that pip accepts; return its SHA-256."""
    version = path.name.split("-")[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = f"torch-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nSummary: {note}\n"
    tag = "-".join(path.name.removesuffix(".whl").split("-")[2:])
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(f"{folder}/METADATA"), metadata)
        archive.writestr(zipfile.ZipInfo(f"{folder}/WHEEL"), f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(zipfile.ZipInfo(f"{folder}/RECORD"), "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pypi(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """An index on loopback (PEP 503) that has only the CUDA build, as PyPI; its address, folder."""
    write_wheel(tmp_path / "index/simple/torch" / CUDA)
    # The listing of a folder is a page of links, as PEP 503 asks.
    with serve_files(tmp_path / "index") as (url, _):
        yield f"{url}/simple", tmp_path / "index/simple/torch"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder for the build, whose recipe knows the wheel of write_wheel, and no index."""
    sha256 = write_wheel(tmp_path / "known" / CPU)
    write_recipe(tmp_path / "checkout", "http://127.0.0.1:9/simple", sha256)
    return tmp_path / "checkout"


def write_recipe(folder: Path, index: str, sha256: str) -> None:
    path = folder / "docker/images/cpu/torch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe(index, CPU, sha256)))


def recipe(index: str, name: str, sha256: str, platform: str = "linux/amd64") -> dict[str, object]:
    """Return the content of torch.json."""
    return {
        "version": "2.13.0",
        "python": "3.11",
        "platform": platform,
        "index": index,
        "wheels": {name: [sha256] if sha256 else []},
        "unresolved": [] if sha256 else ["no index was reached"],
    }


def fetch(checkout: Path, index: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Fetch as on a machine whose pip is configured with an index, and with nothing else."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "TORCH_INDEX"))}
    config = {"PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}
    config |= {"PIP_INDEX_URL": index} if index else {}
    return subprocess.run(
        [sys.executable, "-c", env.pop("PROGRAM", FETCH)],
        cwd=checkout,
        env={**inherited, **config, "PYTHONPATH": str(ROOT / "docker"), **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def fetched(checkout: Path) -> list[str]:
    return sorted(path.name for path in (checkout / "build/torch-wheel").rglob("*.whl"))


def test_an_ordinary_machine_asks_the_cpu_index_of_the_recipe(
    checkout: Path, pypi: tuple[str, Path], tmp_path: Path
) -> None:
    index, folder = pypi
    sha256 = write_wheel(folder.parent / "cpu/torch" / CPU)
    write_recipe(checkout, index + "/cpu", sha256)
    done = fetch(checkout, index)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "build/torch-wheel/2.13.0"
    assert fetched(checkout) == [CPU]


def test_the_cuda_build_is_never_taken_for_it(checkout: Path, pypi: tuple[str, Path]) -> None:
    write_recipe(checkout, pypi[0], "0" * 64)
    done = fetch(checkout, pypi[0])
    assert done.returncode == 1
    first, *why, do = done.stderr.splitlines()
    assert first == "build: there is no CPU build of torch 2.13.0"
    assert sum("No matching distribution found for torch==2.13.0+cpu" in line for line in why) == 2
    assert "TORCH_INDEX=INDEX" in do
    assert fetched(checkout) == []


@pytest.mark.parametrize("how", ["PIP_FIND_LINKS", "TORCH_INDEX"])
def test_without_pytorchs_index_a_folder_is_enough(
    checkout: Path, tmp_path: Path, how: str
) -> None:
    done = fetch(checkout, **{how: str(tmp_path / "known")})
    assert done.returncode == 0, done.stderr
    assert fetched(checkout) == [CPU]


def test_another_index_is_asked_alone(checkout: Path, pypi: tuple[str, Path]) -> None:
    index, folder = pypi
    write_recipe(checkout, "http://127.0.0.1:9/simple", write_wheel(folder / CPU))
    assert fetch(checkout, TORCH_INDEX=index).returncode == 0
    assert fetched(checkout) == [CPU]


@pytest.mark.parametrize("how", ["variable", "file"])
@pytest.mark.parametrize("option", ["find-links", "extra-index-url"])
def test_what_pip_is_configured_with_is_not_asked_beside_torch_index(
    checkout: Path, pypi: tuple[str, Path], tmp_path: Path, how: str, option: str
) -> None:
    index, folder = pypi
    write_wheel(folder.parent / "cpu/torch" / CPU)
    place = {"find-links": str(tmp_path / "known"), "extra-index-url": f"{index}/cpu"}[option]
    (tmp_path / "pip.conf").write_text(f"[global]\n{option} = {place}\n")
    variable = {f"PIP_{option.replace('-', '_').upper()}": place}
    env = variable if how == "variable" else {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    done = fetch(checkout, TORCH_INDEX=index, **env)
    assert (done.returncode, fetched(checkout)) == (1, [])
    assert fetch(checkout, TORCH_INDEX=str(tmp_path / "known"), **env).returncode == 0


def test_torch_index_is_asked_where_pip_is_configured_to_ask_none(
    checkout: Path, pypi: tuple[str, Path]
) -> None:
    index, folder = pypi
    write_recipe(checkout, "http://127.0.0.1:9/simple", write_wheel(folder / CPU))
    assert fetch(checkout, TORCH_INDEX=index, PIP_NO_INDEX="1").returncode == 0


def test_the_password_of_an_index_is_not_printed(checkout: Path, pypi: tuple[str, Path]) -> None:
    asked = pypi[0].replace("//", "//reader:s3cret@")
    done = fetch(checkout, TORCH_INDEX=asked)
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr
    assert pypi[0].replace("//", "//****@") in done.stderr


@pytest.mark.parametrize("kind", ["a folder", "a dangling link"])
def test_what_is_no_file_is_fetched_again(checkout: Path, tmp_path: Path, kind: str) -> None:
    path = checkout / "build/torch-wheel/2.13.0" / CPU
    path.parent.mkdir(parents=True)
    if kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    done = fetch(checkout, TORCH_INDEX=str(tmp_path / "known"))
    assert done.returncode == 0, done.stderr
    assert path.is_file()


def test_a_file_with_another_hash_is_refused_and_removed(checkout: Path, tmp_path: Path) -> None:
    sha256 = write_wheel(tmp_path / "other" / CPU, note="other bytes")
    done = fetch(checkout, TORCH_INDEX=str(tmp_path / "other"))
    assert done.returncode == 1
    assert f"{CPU} has sha256 {sha256}, needed" in done.stderr
    assert "add the hash to recipes/torch.toml" in done.stderr
    assert fetched(checkout) == []


def test_a_wheel_that_is_there_is_checked_again(checkout: Path, tmp_path: Path) -> None:
    folder = checkout / "build/torch-wheel/2.13.0"
    write_wheel(folder / CPU)
    assert fetch(checkout).returncode == 0, "no index was needed"
    write_wheel(folder / CPU, note="changed")
    assert fetch(checkout).returncode == 1


def test_the_recipe_knows_the_hash_that_the_image_is_locked_to() -> None:
    wanted = json.loads((ROOT / "docker/images/cpu/torch.json").read_text())
    lock = (ROOT / f"requirements/images/torch-{wanted['version']}-cpu.txt").read_text()
    _, _, block = lock.partition(f"torch=={wanted['version']}+cpu")
    for accepted in wanted["wheels"].values():
        assert all(f"--hash=sha256:{sha256}" in block for sha256 in accepted)


ARM64 = CPU.replace("x86_64", "aarch64")


def test_the_wheel_of_another_platform_is_fetched_beside_the_first(
    checkout: Path, tmp_path: Path
) -> None:
    sha256 = write_wheel(tmp_path / "both" / ARM64)
    write_wheel(tmp_path / "both" / CPU)
    path = checkout / "docker/images/cpu-arm64/torch.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(recipe("http://127.0.0.1:9/simple", ARM64, sha256, "linux/arm64")))
    both = {"TORCH_INDEX": str(tmp_path / "both")}
    for files in ("cpu", "cpu-arm64"):
        done = fetch(checkout, PROGRAM=FETCH.replace("'cpu')", f"'{files}')"), **both)
        assert done.returncode == 0, done.stderr
    assert fetched(checkout) == [ARM64, CPU]


@pytest.mark.parametrize("known", [False, True])
def test_a_wheel_whose_hash_is_unresolved_is_refused_with_the_reason(
    checkout: Path, *, known: bool
) -> None:
    path = checkout / "docker/images/cpu/torch.json"
    path.write_text(json.dumps(recipe("https://example.org/cpu", CPU, "0" * 64 * known)))
    refuse = "from torch_wheel import refuse_unknown_wheel; refuse_unknown_wheel('cpu')"
    done = fetch(checkout, PROGRAM=refuse)
    assert done.returncode == (0 if known else 1)
    if not known:
        what, why, do = done.stderr.splitlines()
        assert "no CPU build of torch 2.13.0 for linux/amd64 yet" in what
        assert "no index was reached" in why
        assert "make lock, where https://example.org/cpu can be reached" in do

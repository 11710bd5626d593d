"""The index of a wheelhouse: pip and uv install from it by hash, and a wrong file is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from loopback import serve_files

from attnimg.errors import AttnimgError
from recipes.wheel_index import write_index

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "{name}"
version = "{version}"
requires-python = ">=3.9"
[tool.setuptools]
py-modules = ["{module}"]
"""


def build_wheel(folder: Path, name: str, version: str) -> None:
    source = folder.parent / f"{name}-{version}"
    source.mkdir()
    module = name.replace("-", "_").lower()
    (source / "pyproject.toml").write_text(
        PROJECT.format(name=name, version=version, module=module)
    )
    (source / f"{module}.py").write_text("ANSWER = 42\n")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)


def write_sums(folder: Path) -> None:
    files = sorted(folder.glob("*.whl"))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheelhouse of two real wheels."""
    folder = tmp_path_factory.mktemp("built") / "dist"
    folder.mkdir()
    build_wheel(folder, "Toy-Kernel", "1.2.post1")
    build_wheel(folder, "other", "0.1+abi")
    write_sums(folder)
    return folder


@pytest.fixture
def wheels(built: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    for path in built.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def index(wheels: Path, tmp_path: Path) -> Path:
    write_index("hopper", wheels, tmp_path / "index")
    return tmp_path / "index"


def install(program: str, url: str, requirements: Path, to: Path) -> subprocess.CompletedProcess:
    """Install by hash, from this index and no other place."""
    start = [sys.executable, "-m", *(["uv", "pip"] if program == "uv" else ["pip"]), "install"]
    alone = ["--no-config", "--no-cache"] if program == "uv" else ["--isolated", "--no-cache-dir"]
    command = [*start, *alone, "-q", "--no-deps", "--require-hashes", "--target", str(to)]
    command += ["--index-url", f"{url}/simple", "-r", str(requirements)]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(to)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize("negotiates", [False, True], ids=["HTML", "JSON"])
@pytest.mark.parametrize("program", ["pip", "uv"])
def test_all_wheels_are_installed_by_hash(
    index: Path, tmp_path: Path, program: str, negotiates: bool
) -> None:
    with serve_files(index, negotiates=negotiates) as (url, asked):
        done = install(program, url, index / "requirements.txt", tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "to/toy_kernel.py").is_file()
    assert (tmp_path / "to/other.py").is_file()
    assert "/simple/toy-kernel/" in asked
    assert any(path.endswith("1.2.post1-py3-none-any.whl") for path in asked)


@pytest.mark.parametrize("program", ["pip", "uv"])
def test_a_file_that_was_replaced_is_refused(index: Path, tmp_path: Path, program: str) -> None:
    wheel = next((index / "files").glob("other-*.whl"))
    content = wheel.read_bytes()
    wheel.unlink()  # a hard link of the wheelhouse
    wheel.write_bytes(content + b"\0")
    with serve_files(index) as (url, _):
        done = install(program, url, index / "requirements.txt", tmp_path / "to")
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()
    assert not (tmp_path / "to/other.py").exists()


@pytest.mark.parametrize("program", ["pip", "uv"])
def test_a_requirement_with_another_hash_is_refused(
    index: Path, tmp_path: Path, program: str
) -> None:
    requirements = tmp_path / "other.txt"
    requirements.write_text(f"other==0.1+abi --hash=sha256:{'0' * 64}\n")
    with serve_files(index) as (url, _):
        done = install(program, url, requirements, tmp_path / "to")
    assert done.returncode != 0
    assert "hash" in done.stderr.lower()


def test_the_metadata_is_beside_each_wheel_with_its_hash(index: Path) -> None:
    page = (index / "simple/other/index.html").read_text()
    content = json.loads((index / "simple/other/index.json").read_text())
    [file] = content["files"]
    metadata = (index / f"files/{file['filename']}.metadata").read_bytes()
    digest = hashlib.sha256(metadata).hexdigest()
    assert file["core-metadata"] == {"sha256": digest}
    assert f'data-core-metadata="sha256={digest}"' in page
    assert b"Name: other" in metadata
    assert 'data-requires-python="&gt;=3.9"' in page
    assert content["versions"] == ["0.1+abi"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_files_may_be_elsewhere(wheels: Path, tmp_path: Path, slash: str) -> None:
    base = "https://example.org/download/v1"
    write_index("hopper", wheels, tmp_path / "index", base_url=base + slash)
    page = (tmp_path / "index/simple/other/index.html").read_text()
    assert f'href="{base}/other-0.1%2Babi-py3-none-any.whl#sha256=' in page


def test_an_index_is_replaced_as_a_whole(wheels: Path, index: Path, tmp_path: Path) -> None:
    (wheels / next(wheels.glob("other-*.whl")).name).unlink()
    write_sums(wheels)
    write_index("hopper", wheels, index)
    assert sorted(path.name for path in (index / "simple").iterdir()) == [
        "index.html", "index.json", "toy-kernel",
    ]  # fmt: skip


def damage_sums(wheels: Path) -> None:
    (wheels / "SHA256SUMS").write_text("")


def damage_missing(wheels: Path) -> None:
    next(wheels.glob("other-*.whl")).unlink()


def damage_content(wheels: Path) -> None:
    next(wheels.glob("other-*.whl")).write_bytes(b"no zip")
    write_sums(wheels)


def damage_name(wheels: Path) -> None:
    next(wheels.glob("other-*.whl")).rename(wheels / "another-0.1+abi-py3-none-any.whl")
    write_sums(wheels)


def damage_trim(wheels: Path) -> None:
    next(wheels.glob("other-*.whl")).unlink()
    build_wheel(wheels, "other", "0.1+trim")
    write_sums(wheels)


def damage_version(wheels: Path) -> None:
    next(wheels.glob("other-*.whl")).rename(wheels / "other-0.2-py3-none-any.whl")
    write_sums(wheels)


def damage_folder(wheels: Path) -> None:
    (wheels / "more-1.0-py3-none-any.whl").mkdir()


def damage_line(wheels: Path) -> None:
    with (wheels / "SHA256SUMS").open("a") as file:
        file.write("<html>\n")


def damage_two_versions(wheels: Path) -> None:
    build_wheel(wheels, "other", "0.2")
    write_sums(wheels)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        pytest.param(damage_version, "its METADATA is for version 0.1+abi", id="another version"),
        pytest.param(damage_folder, "more-1.0-py3-none-any.whl is no file", id="a folder"),
        pytest.param(damage_line, "SHA256SUMS has '<html>'", id="a line that is no hash"),
        pytest.param(
            damage_two_versions,
            "found other 0.1+abi and 0.2, needed one version",
            id="two versions of a package",
        ),
        pytest.param(damage_sums, "is not in SHA256SUMS", id="a wheel without a hash"),
        pytest.param(damage_missing, "is missing", id="a hash without its wheel"),
        pytest.param(damage_content, "is not a wheel", id="no zip file"),
        pytest.param(damage_name, "its METADATA is for other", id="the name of another package"),
        pytest.param(damage_trim, "is a small build", id="a small build"),
    ],
)
def test_a_wrong_wheelhouse_is_refused(wheels: Path, tmp_path: Path, damage, why: str) -> None:
    damage(wheels)
    with pytest.raises(AttnimgError) as refused:
        write_index("hopper", wheels, tmp_path / "index")
    assert why in refused.value.why
    assert not (tmp_path / "index").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttnimgError, match="no wheels of cpu"):
        write_index("cpu", tmp_path, tmp_path / "index")


def test_hashes_with_a_star_before_the_name_are_read(wheels: Path, tmp_path: Path) -> None:
    sums = wheels / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("  ", " *"))
    assert len(write_index("hopper", wheels, tmp_path / "index")) == 2


def test_two_wheels_of_one_version_are_one_requirement(wheels: Path, tmp_path: Path) -> None:
    wheel = next(wheels.glob("other-*.whl"))
    (wheels / wheel.name.replace("-py3-", "-cp39-")).write_bytes(wheel.read_bytes() + b"\0")
    write_sums(wheels)
    write_index("hopper", wheels, tmp_path / "index")
    lines = (tmp_path / "index/requirements.txt").read_text().splitlines()
    assert [line.count("--hash=sha256:") for line in lines] == [2, 1]
    with serve_files(tmp_path / "index") as (url, _):
        done = install("pip", url, tmp_path / "index/requirements.txt", tmp_path / "to")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["a folder with other files", "a link", "a file"])
def test_other_files_are_not_removed(wheels: Path, tmp_path: Path, kind: str) -> None:
    out, kept = tmp_path / "out", tmp_path / "mine"
    if kind == "a file":
        out.write_text("mine")
        kept = out
    else:
        kept.mkdir()
        (kept / "thesis.txt").write_text("mine")
        if kind == "a link":
            out.symlink_to(kept)
        else:
            kept.rename(out)
            kept = out
    with pytest.raises(AttnimgError, match="the index can't be written into"):
        write_index("hopper", wheels, out)
    assert (kept if kind == "a file" else kept / "thesis.txt").read_text() == "mine"


def test_an_empty_folder_becomes_an_index(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    assert write_index("hopper", wheels, tmp_path / "index")

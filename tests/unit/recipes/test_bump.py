"""Newer releases are found on an index, and each becomes one commit with what it changes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from loopback import serve_json

from attnimg.errors import AttnimgError
from recipes.bump import Bump, apply_bump, commit_bumps, find_bumps
from recipes.files import write_all
from recipes.package_index import PackageIndex
from recipes.read import read_recipes
from recipes.render.mounted import mounted_files
from recipes.solve.lock import read_locks
from recipes.solve.plan import solve_all

ROOT = Path(__file__).parents[3]
TODAY = date(2026, 11, 27)
RECIPES = read_recipes(ROOT)
OLD = RECIPES.kernels["xformers"].version
LOCK = (ROOT / "requirements/lock.txt").read_text()


def file(name: str, digest: str = "a" * 64, **more: Any) -> dict[str, Any]:
    return {"filename": name, "url": f"../{name}", "hashes": {"sha256": digest}, **more}


def current() -> dict[str, list[dict[str, Any]]]:
    """An index that has the pinned releases and no other."""
    found = {}
    for name, kernel in RECIPES.kernels.items():
        if kernel.form != "git":
            stem = f"{name.replace('-', '_')}-{kernel.version}"
            wheel = f"{stem}-cp39-abi3-manylinux_2_24_x86_64.whl"
            found[name] = [file(f"{stem}.tar.gz"), file(wheel)]
    for name, version in RECIPES.stack.items():
        found[name] = [file(f"{name}-{version}-py3-none-any.whl")]
    return found


@pytest.fixture
def packages() -> dict[str, list[dict[str, Any]]]:
    """What the index has; a test adds to it."""
    return current()


@pytest.fixture
def index(packages: dict[str, list[dict[str, Any]]]) -> Iterator[PackageIndex]:
    def answer(path: str, _: object) -> Any:
        name = path.strip("/").rpartition("/")[2]
        files = packages.get(name)
        if isinstance(files, bytes):
            return files
        return None if files is None else {"meta": {"api-version": "1.1"}, "files": files}

    with serve_json(answer) as url:
        yield PackageIndex(f"{url}/simple/", base=RECIPES.bases["bookworm"])


def find(index: PackageIndex, pin: str = "") -> list[Bump]:
    return find_bumps(RECIPES, index, lock=LOCK, pin=pin)


def test_pins_without_a_newer_release_are_left(index: PackageIndex) -> None:
    assert find(index) == []


NEW = "99.1"


@pytest.mark.parametrize(
    ("name", "more"),
    [
        pytest.param(f"xformers-{NEW}rc1.tar.gz", {}, id="a release candidate"),
        pytest.param(f"xformers-{NEW}.tar.gz", {"yanked": "broken"}, id="a yanked release"),
        pytest.param(f"xformers-{NEW}-py3-none-any.whl", {}, id="a wheel of an sdist's pin"),
        pytest.param("xformers-0.0.1.tar.gz", {}, id="an older release"),
        pytest.param("xformers-nightly.tar.gz", {}, id="a file without a version"),
        pytest.param(f"xformers-{NEW}.tar.gz", {"hashes": {}}, id="a file without a hash"),
    ],
)
def test_a_file_that_no_image_can_use_is_no_newer_release(
    index: PackageIndex, packages: dict[str, list[dict[str, Any]]], name: str, more: dict[str, Any]
) -> None:
    packages["xformers"].append({**file(name), **more})
    assert find(index) == []


def test_a_newer_sdist_is_found_with_its_hash(
    index: PackageIndex, packages: dict[str, list[dict[str, Any]]]
) -> None:
    packages["xformers"] += [file(f"xformers-{NEW}.tar.gz", "b" * 64), file("xformers-9.tar.gz")]
    assert find(index) == [Bump("xformers", OLD, NEW, "recipes/kernels/xformers.toml", "b" * 64)]


def test_of_a_wheel_that_file_counts_which_an_image_installs(
    index: PackageIndex, packages: dict[str, list[dict[str, Any]]]
) -> None:
    packages["torchao"] += [
        file("torchao-99.1-cp312-cp312-manylinux_2_24_x86_64.whl", "1" * 64),
        file("torchao-99.1-py3-none-any.whl", "2" * 64),
        file("torchao-99.1-cp310-abi3-manylinux_2_24_x86_64.whl", "3" * 64),
        file("torchao-99.1-cp310-abi3-macosx_11_0_arm64.whl", "4" * 64),
    ]
    [bump] = find(index)
    assert (bump.newer, bump.sha256) == ("99.1", "3" * 64)


def test_a_package_of_the_lock_file_is_found_by_name(
    index: PackageIndex, packages: dict[str, list[dict[str, Any]]]
) -> None:
    packages["urllib3"] = [file("urllib3-99.1-py3-none-any.whl")]
    [bump] = find(index, "urllib3")
    assert (bump.newer, bump.file) == ("99.1", "requirements/lock.txt")
    assert find(index) == []
    with pytest.raises(AttnimgError, match="no pin 'urlib3'"):
        find(index, "urlib3")


def test_an_index_that_lacks_a_pin_is_refused(
    index: PackageIndex, packages: dict[str, list[dict[str, Any]]]
) -> None:
    del packages["xformers"]
    with pytest.raises(AttnimgError, match="xformers can't be looked up"):
        find(index)


@pytest.mark.parametrize(
    "answer",
    [b"", b"[]", b'{"files": 1}', b'{"files": [1]}', b'{"files": [{"hashes": {}}]}', b"\xff"],
)
def test_an_index_that_answers_otherwise_is_refused(
    index: PackageIndex, packages: dict[str, Any], answer: bytes
) -> None:
    packages["xformers"] = answer
    with pytest.raises(AttnimgError, match="xformers can't be looked up") as refused:
        find(index)
    assert "needed the JSON of PEP 691" in refused.value.why


@pytest.mark.parametrize(("name", "newer"), [("bookworm", "2"), ("trixie", "1")])
def test_a_wheel_is_one_for_the_base(
    packages: dict[str, list[dict[str, Any]]], name: str, newer: str
) -> None:
    base = RECIPES.bases[name]
    tag = f"cp{base.python.replace('.', '')}-none-manylinux_2_{base.glibc[2:]}_x86_64"
    packages["torchao"] += [
        file("torchao-99.1-cp313-none-manylinux_2_41_x86_64.whl", "1" * 64),
        file("torchao-99.1-cp311-none-manylinux_2_36_x86_64.whl", "2" * 64),
    ]
    with serve_json(lambda path, _: {"files": packages[path.split("/")[-2]]}) as url:
        found = PackageIndex(f"{url}/simple", base=base).newest("torchao", form="wheel")
    assert (tag.startswith("cp3"), found.sha256) == (True, newer * 64)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean clone of what is in this checkout."""
    root = tmp_path / "checkout"
    listed = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
    git(root, "init", "-q")
    git(root, "config", "user.name", "t")
    git(root, "config", "user.email", "t@example.org")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "One")
    return root


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def render(root: Path, _: str) -> None:
    """Solve, and render what is mounted in builds: the part of `make lock` that takes no minute.

    An sdist is in no lock file: locking would change nothing else.
    """
    plans = solve_all(read_recipes(root))
    locks = read_locks(plans, root=root)
    for plan in plans:
        write_all(root, mounted_files(plan, lock=locks[plan.image.name]))


XFORMERS = Bump("xformers", OLD, NEW, "recipes/kernels/xformers.toml", "b" * 64)
# beside: xFormers can't be imported beside this one, so that no image with both can be solved.
IMPOSSIBLE = Bump("flash-attn", "2.8.3.post2", "99", "recipes/kernels/flash-attn.toml", "c" * 64)


def test_each_pin_becomes_one_commit_and_one_that_fails_leaves_nothing(checkout: Path) -> None:
    done = list(commit_bumps([IMPOSSIBLE, XFORMERS], checkout, relock=render, today=TODAY))
    assert [(subject, bool(error)) for subject, error in done] == [
        (str(IMPOSSIBLE), True),
        (str(XFORMERS), False),
    ]
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "log", "--format=%s").splitlines() == [str(XFORMERS), "One"]
    changed = set(git(checkout, "show", "--name-only", "--format=").splitlines())
    assert {
        "recipes/kernels/xformers.toml",
        "docker/images/hopper/kernels/xformers.json",
    } <= changed
    assert not [path for path in changed if "flash-attn" in path and "xformers" not in path]
    body = git(checkout, "show", "-s", "--format=%b")
    assert "docker/images/hopper/kernels/xformers.json" in body
    kernel = read_recipes(checkout).kernels["xformers"]
    assert (kernel.version, kernel.source) == (NEW, f"xformers=={NEW}")
    assert kernel.sha256 == "b" * 64


def test_what_locking_changes_without_a_pin_gets_a_commit_of_its_own(checkout: Path) -> None:
    calls = []

    def relock(root: Path, package: str) -> None:
        calls.append(package)
        if len(calls) == 1:  # a base's digest moved
            path = root / "recipes/bases.toml"
            path.write_text(path.read_text() + "# new\n")

    pinned = Bump("trl", RECIPES.stack["trl"], "99.0", "pyproject.toml")
    done = list(commit_bumps([pinned], checkout, relock=relock, today=TODAY))
    assert [subject for subject, _ in done] == [
        "Lock packages and the base image again", str(pinned),
    ]  # fmt: skip
    assert git(checkout, "show", "--name-only", "--format=") == "pyproject.toml"
    assert 'trl==99.0"' in (checkout / "pyproject.toml").read_text()
    assert git(checkout, "show", "--name-only", "--format=", "HEAD~1") == "recipes/bases.toml"
    assert calls == ["", ""]


def test_a_package_that_another_holds_back_is_named(checkout: Path) -> None:
    held = Bump("urllib3", "2.8.0", "99.1", "requirements/lock.txt")
    [(subject, error)] = commit_bumps([held], checkout, relock=lambda *_: None, today=TODAY)
    assert (subject, "holds it back" in error) == (str(held), True)
    assert git(checkout, "log", "--format=%s") == "One"


def test_a_checkout_with_changes_is_refused_and_keeps_them(checkout: Path) -> None:
    (checkout / "mine.txt").write_text("mine")
    with pytest.raises(AttnimgError, match="uncommitted changes") as refused:
        list(commit_bumps([XFORMERS], checkout, relock=render, today=TODAY))
    assert "mine.txt" in refused.value.why
    assert (checkout / "mine.txt").read_text() == "mine"
    assert git(checkout, "log", "--format=%s") == "One"


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        pytest.param('"foo==1.2"', True, id="the pin"),
        pytest.param("# foo==1.2.", True, id="the end of a sentence"),
        pytest.param('"foo==1.2; python_version > 3"', True, id="a marker"),
        pytest.param('"foo==1.20.0"', False, id="a longer number"),
        pytest.param('"foo==1.2.1"', False, id="a later release"),
        pytest.param('"foo==1.2+cu130"', False, id="another build"),
        pytest.param('"foo==1.2rc1"', False, id="a candidate"),
        pytest.param('"foo==1.2.*"', False, id="any release of it"),
        pytest.param('"foo==1x2"', False, id="a dot stands for itself"),
        pytest.param('"my-foo==1.2"', False, id="the end of another name"),
        pytest.param('"my.foo==1.2"', False, id="the end of another name after a dot"),
    ],
)
def test_only_the_pin_is_changed(tmp_path: Path, text: str, changed: bool) -> None:
    (tmp_path / "pyproject.toml").write_text(f"{text}\nfoo==1.2\n")
    apply_bump(Bump("foo", "1.2", "3.0", "pyproject.toml"), tmp_path, today=TODAY)
    expected = text.replace("foo==1.2", "foo==3.0") if changed else text
    assert (tmp_path / "pyproject.toml").read_text() == f"{expected}\nfoo==3.0\n"


@pytest.mark.parametrize("digest", [r"\g<0>", '1"\nform = "git', "A" * 64, "a" * 63])
def test_a_hash_that_is_none_is_not_written(tmp_path: Path, digest: str) -> None:
    (tmp_path / "a.toml").write_text('source = "foo==1.2"\nversion = "1.2"\nsha256 = "0"\n')
    before = (tmp_path / "a.toml").read_text()
    with pytest.raises(AttnimgError, match="foo can't be bumped") as refused:
        apply_bump(Bump("foo", "1.2", "3.0", "a.toml", digest), tmp_path, today=TODAY)
    assert "needed 64 hexadecimal digits" in refused.value.why
    assert (tmp_path / "a.toml").read_text() == before

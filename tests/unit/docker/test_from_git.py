"""The labels of an image name the commit that was built, or say that it was none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "docker"))

from from_git import BUILT_FROM, source_labels  # noqa: E402

EPOCH = "1767225600"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit of 2026-01-01."""
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.com")
        monkeypatch.setenv(f"GIT_{name}_DATE", f"{EPOCH} +0000")
    (tmp_path / "attnimg").mkdir()
    (tmp_path / "attnimg/a.py").write_text("a = 1\n")
    (tmp_path / "Makefile").write_text("a:\n")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    for command in ("init -q", "add .", "commit -q -m first"):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    return tmp_path


def test_a_commit_has_the_version_and_its_own_time(checkout: Path) -> None:
    found = source_labels(checkout)
    assert found["VERSION"] == "1.2.3"
    assert len(found["REVISION"]) == 40
    assert found["CREATED"] == "2026-01-01T00:00:00Z"
    assert found["SOURCE_DATE_EPOCH"] == EPOCH


@pytest.mark.parametrize(
    ("path", "version"),
    [
        pytest.param("attnimg/a.py", "dev", id="a changed file of the build"),
        pytest.param("Makefile", "dev", id="a changed file that git knows"),
        pytest.param("attnimg/new.py", "dev", id="a new file that the build would copy"),
        pytest.param("docker/new.sh", "dev", id="a new file in docker/"),
        pytest.param("notes.txt", "1.2.3", id="a new file that the build does not read"),
        pytest.param("outputs/run/receipt.json", "1.2.3", id="the output of a run"),
    ],
)
def test_what_git_has_not_committed_is_not_a_version(
    checkout: Path, capsys: pytest.CaptureFixture[str], path: str, version: str
) -> None:
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("changed\n")
    found = source_labels(checkout)
    assert found["VERSION"] == version
    assert found["REVISION"].endswith("-dirty") is (version == "dev")
    assert (path in capsys.readouterr().err) is (version == "dev")


@pytest.mark.parametrize(
    ("path", "version"),
    [
        pytest.param("attnimg/build/__init__.py", "dev", id="a package that git ignores"),
        pytest.param("attnimg/a.local.py", "dev", id="a file that git ignores"),
        pytest.param("attnimg/__pycache__/a.cpython-311.pyc", "1.2.3", id="not in the context"),
        pytest.param("build/wheels/a.whl", "1.2.3", id="what the build does not read"),
    ],
)
def test_what_git_ignores_and_the_build_copies_is_not_a_version(
    checkout: Path, capsys: pytest.CaptureFixture[str], path: str, version: str
) -> None:
    (checkout / ".git/info/exclude").write_text("build/\n*.local.py\n__pycache__/\n")
    (checkout / path).parent.mkdir(parents=True, exist_ok=True)
    (checkout / path).write_text("a = 2\n")
    found = source_labels(checkout)
    assert found["VERSION"] == version
    assert (path in capsys.readouterr().err) is (version == "dev")


def test_a_folder_of_another_repository_has_no_commit(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "unpacked").mkdir()
    (checkout / "unpacked/pyproject.toml").write_text('[project]\nversion = "9"\n')
    found = source_labels(checkout / "unpacked")
    assert (found["VERSION"], found["REVISION"]) == ("dev", "unknown")
    assert f"another repository, {checkout}" in capsys.readouterr().err
    (checkout / "link").symlink_to(checkout)
    assert source_labels(checkout / "link")["VERSION"] == "1.2.3", "the same folder by a link"


def test_a_repository_of_the_environment_is_not_asked(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = source_labels(checkout)
    subprocess.run(["git", "init", "-q", str(checkout / "outputs/other")], check=True)
    monkeypatch.setenv("GIT_DIR", str(checkout / "outputs/other/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(checkout))
    assert source_labels(checkout) == expected


def test_a_folder_without_git_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    found = source_labels(tmp_path)
    assert (found["VERSION"], found["REVISION"]) == ("dev", "unknown")
    assert found["CREATED"] == "1980-01-01T00:00:00Z"
    assert "not a git repository" in capsys.readouterr().err


def test_a_date_of_the_environment_is_used(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert source_labels(checkout)["CREATED"] == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "253402300799")
    assert source_labels(checkout)["CREATED"] == "9999-12-31T23:59:59Z"


@pytest.mark.parametrize("text", ["yesterday", "-1", "1.5", "999999999999", "9" * 5000, "\u0661"])
def test_a_date_of_the_environment_that_is_none_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(SystemExit, match="needed seconds since 1970"):
        source_labels(checkout)


def test_what_the_build_reads_is_what_docker_may_read() -> None:
    lines = (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    # Patches are a build context of their own.
    assert set(BUILT_FROM) == allowed | {"recipes/patches"}

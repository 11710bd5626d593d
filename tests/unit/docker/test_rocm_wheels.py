"""The ROCm build of torch is refused without its index, and verified by its hash or marked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from loopback import serve_files
from rocm_wheels_index import FILES, TORCH, TRITON, write_wheels

ROOT = Path(__file__).parents[3]
LOCK = "2.14.1-rocm7.2"
WHY = "PyTorch's index for ROCm 7.2 was not reached"
FETCH = "from rocm_wheels import rocm_wheels; print(*rocm_wheels('rocm'))"


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """An index on loopback with both wheels (PEP 503): its address, and their hashes."""
    hashes = write_wheels(tmp_path / "index")
    with serve_files(tmp_path / "index") as (url, _):
        yield url, hashes


def checkout(folder: Path, index: str, hashes: Mapping[str, str] | None = None) -> Path:
    """Write what a checkout has for an image for ROCm, with or without known hashes."""
    path = folder / "docker/images/rocm/rocm.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "requirements": list(FILES), "python": "3.11", "lock": LOCK, "index": index,
        "hashes": {key: [value] for key, value in (hashes or {}).items()},
        "unresolved": "" if hashes else WHY,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    locks = folder / "requirements/images"
    locks.mkdir(parents=True, exist_ok=True)
    for layer in ("torch", "stack", "toolchain"):
        (locks / f"{layer}-{LOCK}.txt").write_text(f"{layer}-needs==1\n")
    return folder


def fetch(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "TORCH_INDEX"))}
    config = {"PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}
    done = subprocess.run(
        [sys.executable, "-c", FETCH],
        cwd=folder, env={**inherited, **config, "PYTHONPATH": str(ROOT / "docker"), **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done


def test_with_known_hashes_the_recipe_s_index_is_asked_once(
    tmp_path: Path, index: tuple[str, dict[str, str]]
) -> None:
    url, hashes = index
    folder = checkout(tmp_path / "checkout", url, hashes)
    for _ in range(2):
        done = fetch(folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [f"build/torch-wheel/{LOCK}", LOCK]
        shutil.rmtree(tmp_path / "index", ignore_errors=True)
    found = sorted(path.name for path in (folder / "build/torch-wheel" / LOCK).iterdir())
    assert found == sorted(FILES.values())


def test_a_file_with_another_hash_is_refused(
    tmp_path: Path, index: tuple[str, dict[str, str]]
) -> None:
    url, hashes = index
    folder = checkout(tmp_path / "checkout", url, {**hashes, TRITON: "0" * 64})
    done = fetch(folder)
    assert done.returncode == 1
    what, why, do = done.stderr.splitlines()
    assert what == "build: there is no ROCm build of torch for the image rocm"
    assert f"{TRITON} has sha256 {hashes[TRITON]}, needed {'0' * 64}" in why
    assert do.startswith("  do:  make build/rocm TORCH_INDEX=")


def test_a_changed_file_of_an_earlier_download_is_fetched_again(
    tmp_path: Path, index: tuple[str, dict[str, str]]
) -> None:
    folder = checkout(tmp_path / "checkout", *index)
    assert fetch(folder).returncode == 0
    wheel = folder / "build/torch-wheel" / LOCK / FILES[TORCH]
    wheel.write_bytes(b"other")
    assert fetch(folder).returncode == 0
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() == index[1][TORCH]


@pytest.mark.parametrize("how", ["an index", "a folder"])
def test_unknown_hashes_are_taken_from_a_named_index_with_a_warning(
    tmp_path: Path, index: tuple[str, dict[str, str]], how: str
) -> None:
    url, hashes = index
    place = url
    if how == "a folder":
        place = str(tmp_path / "flat")
        Path(place).mkdir()
        for name in FILES.values():
            shutil.copy(next((tmp_path / "index").rglob(name)), place)
    folder = checkout(tmp_path / "checkout", "http://127.0.0.1:9/none")
    done = fetch(folder, TORCH_INDEX=place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [f"build/torch-wheel/{LOCK}", f"{LOCK}-unverified"]
    what, *files, why, do = done.stderr.splitlines()
    assert what == "build: warning: nobody has verified these files"
    assert [line.strip() for line in files] == [f"{k} sha256:{v}" for k, v in hashes.items()]
    assert (why, do.partition("make lock")[1]) == (f"  why: {WHY}", "make lock")
    locks = folder / "requirements/images"
    torch = (locks / f"torch-{LOCK}-unverified.txt").read_text()
    assert torch == "torch-needs==1\n" + "".join(
        f"{key} --hash=sha256:{value}\n" for key, value in hashes.items()
    )
    assert (locks / f"stack-{LOCK}-unverified.txt").read_text() == "stack-needs==1\n"


def test_an_unverified_file_is_asked_for_again(
    tmp_path: Path, index: tuple[str, dict[str, str]]
) -> None:
    folder = checkout(tmp_path / "checkout", "http://127.0.0.1:9/none")
    assert fetch(folder, TORCH_INDEX=index[0]).returncode == 0
    other = write_wheels(tmp_path / "index", note="another build")
    done = fetch(folder, TORCH_INDEX=index[0])
    assert other[TORCH] != index[1][TORCH]
    assert f"{TORCH} sha256:{other[TORCH]}" in done.stderr


@pytest.mark.parametrize("place", ["http://127.0.0.1:9/none", "no-folder"])
def test_an_index_that_does_not_answer_is_an_error_in_words(tmp_path: Path, place: str) -> None:
    done = fetch(checkout(tmp_path / "checkout", "http://127.0.0.1:9/none"), TORCH_INDEX=place)
    assert done.returncode == 1
    assert "there is no ROCm build of torch" in done.stderr
    assert "No matching distribution found" in done.stderr


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A copy of what docker/build.py reads, with a docker that prints how it was called."""
    folder = tmp_path / "whole"
    shutil.copytree(ROOT / "docker", folder / "docker")
    shutil.copytree(ROOT / "requirements/images", folder / "requirements/images")
    shutil.copytree(ROOT / "attnimg/data", folder / "attnimg/data")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "bin").mkdir()
    (folder / "bin/docker").write_text(
        '#!/bin/sh\n[ "$1" = info ] && echo /nowhere && exit\n'
        '[ "$1" = image ] && echo sha256:1234 && exit\necho "$@"\n'
    )
    (folder / "bin/docker").chmod(0o755)
    return folder


def build(whole: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{whole / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "docker/build.py", "rocm", *arguments],
        cwd=whole, env={**os.environ, "PATH": path, "PIP_CONFIG_FILE": "/dev/null", **env},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [["--check"], [], ["--wheels-to", "dist/rocm"]])
def test_an_image_for_rocm_is_refused_without_an_index(whole: Path, arguments: list[str]) -> None:
    done = build(whole, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    what, why, do = done.stderr.splitlines()
    assert what == "build: the image rocm can't be built yet"
    assert WHY in why
    assert "make lock" in do
    assert "TORCH_INDEX=https://" in do


def test_one_command_builds_it_where_an_index_is_named(
    whole: Path, index: tuple[str, dict[str, str]]
) -> None:
    done = build(whole, TORCH_INDEX=index[0])
    assert done.returncode == 0, done.stderr
    *command, last = done.stdout.splitlines()[-1].split()
    assert last == "rocm"
    settings = {after for word, after in pairwise(command) if word == "--set"}
    places = {text for text in settings if ".contexts." in text}
    assert f"rocm.contexts.torch-wheel=build/torch-wheel/{LOCK}" in places
    assert f"rocm_flash-attn.contexts.torch-wheel=build/torch-wheel/{LOCK}" in places
    assert f"rocm_common.args.LOCK={LOCK}-unverified" in settings
    assert "nobody has verified" in done.stderr


def test_verified_wheels_are_built_with_the_lock_files_of_the_recipe(
    whole: Path, index: tuple[str, dict[str, str]]
) -> None:
    path = whole / "docker/images/rocm/rocm.json"
    content = json.loads(path.read_text())
    hashes = {key: [value] for key, value in index[1].items()}
    path.write_text(json.dumps({**content, "index": index[0], "hashes": hashes, "unresolved": ""}))
    done = build(whole)
    assert done.returncode == 0, done.stderr
    assert "args.LOCK" not in done.stdout
    assert "verified" not in done.stderr


def make_key(folder: Path, *names: str) -> tuple[Path, list[str]]:
    """Write a file with keys, each with a subkey, as AMD's has; return their fingerprints too."""
    folder.mkdir(mode=0o700)
    env = {**os.environ, "GNUPGHOME": str(folder)}

    def gpg(*arguments: str) -> str:
        command = ["gpg", "--batch", "--quiet", "--passphrase", "", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    for name in names:
        gpg("--quick-generate-key", name, "default", "default")
    path = folder.with_suffix(".asc")
    path.write_text(gpg("--armor", "--export"))
    lines = gpg("--with-colons", "--list-keys").splitlines()
    keys = [after for before, after in pairwise(lines) if before.startswith("pub:")]
    subprocess.run(["gpgconf", "--kill", "gpg-agent"], env=env, check=False)
    return path, [line.split(":")[9] for line in keys]


@pytest.mark.skipif(shutil.which("gpg") is None, reason="gpg is not installed")
@pytest.mark.parametrize(
    ("names", "needed", "code"),
    [
        pytest.param(["amd"], 0, 0, id="AMD's key is taken"),
        pytest.param(["amd"], None, 1, id="another key is refused"),
        pytest.param(["amd", "other"], 0, 1, id="a second key in the file is refused"),
        pytest.param([], None, 1, id="no key is refused"),
    ],
)
def test_the_key_of_amd_s_packages_is_compared(
    tmp_path: Path, names: list[str], needed: int | None, code: int
) -> None:
    """Run the lines of the Dockerfile that compare it."""
    path, keys = make_key(tmp_path / "k", *names)
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    lines = text[text.index("found=$( (gpg ") : text.index('echo "deb [arch=amd64 signed-by=')]
    wanted = "0" * 40 if needed is None else keys[needed]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        env={**os.environ, "key": str(path), "ROCM_KEY_FINGERPRINT": wanted},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    if code:
        assert f"needed {wanted}" in done.stderr

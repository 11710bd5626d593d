"""A folder of wheels: what it says of itself, and when an image may be built from it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ABI = "cp311-torch2.14-cu130"
KEYS = {"flash-attn": "aaaa", "sageattention": "bbbb"}


def run(task: str, folder: Path, *, abi: str = ABI, keys: Mapping[str, str] = KEYS) -> str:
    """Run docker/wheelhouse.py as the Dockerfile does; return what it prints, "" when it fits."""
    with tempfile.NamedTemporaryFile("w") as wanted:
        json.dump({"image": "hopper", "abi": abi, "kernels": dict(keys)}, wanted)
        wanted.flush()
        program = str(ROOT / "docker/wheelhouse.py")
        command = [sys.executable, program, task, str(folder), wanted.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (done.stderr == "")
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def wheelhouse(tmp_path: Path) -> Path:
    """Two wheels with the reports that docker/kernel/build.py leaves, gathered."""
    for name, key in (("flash-attn", "aaaa"), ("sageattention", "bbbb")):
        (tmp_path / f"{name}-1.whl").write_bytes(name.encode())
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "key": key}))
    run("write", tmp_path)
    return tmp_path


def test_one_manifest_stands_for_all_reports(wheelhouse: Path) -> None:
    names = sorted(path.name for path in wheelhouse.iterdir())
    assert names == ["SHA256SUMS", "flash-attn-1.whl", "manifest.json", "sageattention-1.whl"]
    manifest = json.loads((wheelhouse / "manifest.json").read_text())
    assert (manifest["image"], manifest["abi"]) == ("hopper", ABI)
    assert [kernel["name"] for kernel in manifest["kernels"]] == ["flash-attn", "sageattention"]


def test_the_sums_are_those_that_sha256sum_takes(wheelhouse: Path) -> None:
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=wheelhouse, capture_output=True)
    assert done.returncode == 0


def test_what_was_just_written_fits(wheelhouse: Path) -> None:
    assert run("verify", wheelhouse) == ""


def test_an_image_without_kernels_takes_an_empty_one(tmp_path: Path) -> None:
    run("write", tmp_path, keys={})
    assert run("verify", tmp_path, keys={}) == ""


def change(folder: Path) -> None:
    (folder / "flash-attn-1.whl").write_bytes(b"other")


def add(folder: Path) -> None:
    (folder / "extra-1.whl").write_bytes(b"extra")


def lose(folder: Path) -> None:
    (folder / "flash-attn-1.whl").unlink()


def unsaid(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


def garble(folder: Path) -> None:
    (folder / "SHA256SUMS").write_bytes(b"\xff no sums\n")


def cut(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"abi": "cp311-t')


def empty(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"abi": "x", "kernels": [{}]}')


@pytest.mark.parametrize(
    ("harm", "keys", "abi", "says"),
    [
        pytest.param(
            change,
            KEYS,
            ABI,
            "the hash of flash-attn-1.whl is not in SHA256SUMS",
            id="a changed wheel",
        ),
        pytest.param(
            add, KEYS, ABI, "the hash of extra-1.whl is not in SHA256SUMS", id="a wheel more"
        ),
        pytest.param(lose, KEYS, ABI, "flash-attn-1.whl is missing", id="a wheel less"),
        pytest.param(unsaid, KEYS, ABI, "found no SHA256SUMS", id="one without its sums"),
        pytest.param(
            garble,
            KEYS,
            ABI,
            "the hash of flash-attn-1.whl is not in SHA256SUMS",
            id="garbled sums",
        ),
        pytest.param(cut, KEYS, ABI, "manifest.json is not a manifest", id="a manifest cut off"),
        pytest.param(
            empty,
            KEYS,
            ABI,
            "manifest.json is not a manifest: KeyError",
            id="kernels without a name",
        ),
        pytest.param(
            None,
            KEYS | {"flash-attn": "cccc"},
            ABI,
            "flash-attn was built from recipe aaaa, needed cccc",
            id="a wheel of another recipe",
        ),
        pytest.param(
            None,
            KEYS | {"xformers": "dddd"},
            ABI,
            "the kernel xformers is missing",
            id="a kernel too few",
        ),
        pytest.param(
            None,
            {"flash-attn": "aaaa"},
            ABI,
            "sageattention is not a kernel of this",
            id="one too many",
        ),
        pytest.param(
            None,
            KEYS,
            "cp311-torch2.15-cu132",
            "found cp311-torch2.14-cu130, needed cp311-torch2.15-cu132",
            id="wheels for another torch",
        ),
    ],
)
def test_refuses(
    wheelhouse: Path, harm: Callable[[Path], None] | None, keys: dict[str, str], abi: str, says: str
) -> None:
    if harm:
        harm(wheelhouse)
    told = run("verify", wheelhouse, keys=keys, abi=abi)
    assert says in told
    assert [mark in told for mark in ("why:", "do:")] == [True, True]

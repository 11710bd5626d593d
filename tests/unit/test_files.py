"""Test the hashes of files: of kernels, by which proofs are cached, and of models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
from run_facts import a_problem

from attnimg import files
from attnimg.backends import find_backend
from attnimg.facts import Machine
from attnimg.files import CachedHasher, cache_folder, read_checked, write_checked
from attnimg.machine import probe
from attnimg.selection.attention_shapes import read_model
from attnimg.verification.proofs import Setting, prove

KERNEL = Path(__file__).parents[1] / "fixtures" / "flash_attn2"
LARGE = 3 << 20
SMALL = read_model({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2})


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make files count as settled at once."""
    monkeypatch.setattr(files, "_SETTLED_S", -60.0)


def large_file(folder: Path, *, letter: bytes) -> Path:
    """Write 3 MiB with one modification time, whatever they hold."""
    folder.mkdir(exist_ok=True)
    (folder / "kernel.so").write_bytes(letter * LARGE)
    os.utime(folder / "kernel.so", ns=(10**18, 10**18))
    return folder / "kernel.so"


def hash_of(folder: Path, kept: Path | None) -> str:
    hashes = CachedHasher(kept)
    found = hashes.hash_folder(folder)
    hashes.save()
    return found


@pytest.mark.usefixtures("settled")
def test_other_content_of_the_same_size_and_time_is_another_hash(tmp_path: Path) -> None:
    large_file(tmp_path / "kernel", letter=b"a")
    before = hash_of(tmp_path / "kernel", tmp_path / "kept")
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") == before
    # In place: device, inode, size and mtime stay, and ctime tells.
    large_file(tmp_path / "kernel", letter=b"b")
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") != before


@pytest.mark.usefixtures("settled")
def test_the_hash_of_a_large_file_is_remembered(tmp_path: Path) -> None:
    file = large_file(tmp_path / "kernel", letter=b"a")
    before = hash_of(tmp_path / "kernel", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    (name,) = read_checked(kept, at_most=1 << 20)
    write_checked(kept, {name: "0" * 64})  # so that it shows whether the file is read
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") != before
    file.touch()
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") == before


@pytest.mark.usefixtures("settled")
def test_hashes_that_another_user_may_write_are_not_believed(tmp_path: Path) -> None:
    large_file(tmp_path / "kernel", letter=b"a")
    before = hash_of(tmp_path / "kernel", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    (name,) = read_checked(kept, at_most=1 << 20)
    write_checked(kept, {name: "0" * 64})
    kept.chmod(0o666)
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") == before


@pytest.mark.usefixtures("settled")
def test_an_edited_hash_is_not_believed(tmp_path: Path) -> None:
    large_file(tmp_path / "kernel", letter=b"a")
    before = hash_of(tmp_path / "kernel", tmp_path / "kept")
    (kept,) = (tmp_path / "kept").iterdir()
    (found,) = read_checked(kept, at_most=1 << 20).values()
    kept.write_text(kept.read_text().replace(found, "0" * 64))
    assert hash_of(tmp_path / "kernel", tmp_path / "kept") == before


def test_a_file_that_changed_just_now_is_read_again(tmp_path: Path) -> None:
    large_file(tmp_path / "kernel", letter=b"a")
    hash_of(tmp_path / "kernel", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_names_and_small_files_count(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("1")
    first = hash_of(tmp_path, None)
    file.write_text("2")
    second = hash_of(tmp_path, None)
    file.rename(tmp_path / "b.py")
    assert len({first, second, hash_of(tmp_path, None)}) == 3


def test_caches_of_python_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = hash_of(tmp_path, None)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"x")
    assert hash_of(tmp_path, None) == before


def test_a_changed_file_of_a_package_is_another_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "toy_kernel-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-kernel\nVersion: 1.0\n")
    (info / "RECORD").write_text("toy_kernel.py,,\ntoy_kernel-1.0.dist-info/METADATA,,\n")
    (tmp_path / "toy_kernel.py").write_text("right")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = CachedHasher(None).hash_package("toy-kernel")
    (tmp_path / "toy_kernel.py").write_text("wrong")
    assert CachedHasher(None).hash_package("toy-kernel") != before
    (info / "RECORD").unlink()
    assert CachedHasher(None).hash_package("toy-kernel") is None
    assert CachedHasher(None).hash_package("there-is-no-such-package") == ""
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.distribution("there-is-no-such-package")


def test_a_kept_proof_of_a_local_kernel_ends_with_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(KERNEL, tmp_path / "kernel")
    served = f"kernels-community/flash-attn2={tmp_path / 'kernel'}"
    monkeypatch.setenv("LOCAL_KERNELS", served)
    machine = probe.this_machine([])
    before = proof_of(machine, tmp_path / "kept")
    assert not before
    assert proof_of(machine, tmp_path / "kept")
    time.sleep(0.01)
    changed = next((tmp_path / "kernel").rglob("*.py"))
    changed.write_text(changed.read_text() + "\n# another build\n")
    assert not proof_of(machine, tmp_path / "kept")


def proof_of(machine: Machine, folder: Path) -> bool:
    """Prove the local kernel; return whether the proof was kept."""
    backend = find_backend("kernels-community/flash-attn2")
    assert backend is not None
    setting = Setting(machine=machine, environment=dict(os.environ), folder=folder)
    (proof,) = prove([backend], a_problem(model=SMALL), setting=setting, log=lambda text: None)
    assert proof.passed, proof.reasons
    return proof.cached


@pytest.mark.parametrize("named", [True, False], ids=["ATTNIMG_CACHE", "the user's folder"])
def test_the_folder(tmp_path: Path, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    environment = {"ATTNIMG_CACHE": str(tmp_path / "named")} if named else {}
    wanted = tmp_path / ("named" if named else "home/attnimg") / f"proofs-{os.geteuid()}"
    assert cache_folder(environment) == wanted


LIMITED = """
import resource, sys
from pathlib import Path
from attnimg.files import CachedHasher
if sys.argv[2] != "-":
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
print(CachedHasher(None).hash_folder(Path(sys.argv[1])))
"""


def test_files_are_hashed_where_no_thread_can_start(tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / name).write_bytes(name.encode() * 100_000)
    found = [
        subprocess.run(
            [sys.executable, "-c", LIMITED, str(tmp_path), room],
            capture_output=True, text=True, timeout=60, check=True,
        ).stdout
        for room in ("-", str(4 << 20))
    ]  # fmt: skip
    assert found[0] == found[1] != ""

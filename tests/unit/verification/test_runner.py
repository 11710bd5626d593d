"""Test that the parent returns a proof of each kernel, whatever a kernel does to its process."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from run_facts import a_geometry
from served_kernels import prove_served

from attnimg.run_facts import Proof
from attnimg.verification.runner import MOST_LINKS, _absolute_paths, _message, working_folder

STATE = Path(__file__).parents[2] / "fixtures/wrong_kernels/state.py"
GEOMETRY = a_geometry(
    heads=2, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False, sequence_len=64
)
# The fault of a kernel, and the code of the reason; None where the proof passes.
FAULTS = [
    ("garbage", None),
    ("a forged proof", None),
    ("a long line", None),
    ("forks", "process-state"),
    ("a daemon", "process-state"),
    ("none", None),
    ("closes everything", "crash"),
    ("cwd", "process-state"),
    ("a file left", "process-state"),
    ("floods", "process-state"),
    ("leaves a fork behind", "crash"),
    ("dies of a real-time signal", "crash"),
]
NAMES = [f"parent/kernel-{number}" for number in range(len(FAULTS))]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> list[Proof]:
    return prove_served(
        tmp_path_factory.mktemp("kernels"),
        [(name, STATE, fault, GEOMETRY) for name, (fault, _) in zip(NAMES, FAULTS, strict=True)],
    )


pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("place", range(len(FAULTS)), ids=[fault for fault, _ in FAULTS])
def test_the_parent_returns_a_proof_of_each_kernel(proofs: list[Proof], place: int) -> None:
    _, code = FAULTS[place]
    proof = proofs[place]
    assert proof.backend == NAMES[place]
    assert [reason.code for reason in proof.reasons] == ([code] if code else [])


def test_a_file_that_a_kernel_leaves_is_not_among_those_of_the_user(proofs: list[Proof]) -> None:
    assert proofs
    assert not Path("left.txt").exists()


def test_a_child_sees_the_files_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.lock").write_text("[]")
    (tmp_path / "kernel").mkdir()
    monkeypatch.chdir(tmp_path)
    with working_folder() as folder:
        assert (folder / "kernels.lock").read_text() == "[]"
        (folder / "left.txt").write_text("x")
    assert not folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernel", "kernels.lock"]
    kernels = f"a/b=kernel:c/d={tmp_path}/e:f"
    environ = {"LOCAL_KERNELS": kernels, "HF_HOME": "../hf", "A": ".", "B": "x"}
    assert _absolute_paths(environ) == {
        "LOCAL_KERNELS": f"a/b={tmp_path}/kernel:c/d={tmp_path}/e:f",
        "HF_HOME": f"{tmp_path}/../hf",
    }
    assert _absolute_paths({"HOME": "/root"}) == {}


def test_a_removed_and_a_full_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, removed = tmp_path / "full", tmp_path / "removed"
    full.mkdir()
    for number in range(MOST_LINKS + 1):
        (full / str(number)).touch()
    monkeypatch.chdir(full)
    with working_folder() as folder:
        assert folder == full
    removed.mkdir()
    monkeypatch.chdir(removed)
    removed.rmdir()
    with working_folder() as folder:
        assert list(folder.iterdir()) == []
    assert _absolute_paths({"HF_HOME": "./hf"}) == {}
    monkeypatch.chdir(tmp_path)


def test_a_working_folder_is_used_itself_where_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "symlink_to", fill)
    with working_folder() as folder:
        assert folder == tmp_path


def test_no_process_that_a_kernel_started_is_left(proofs: list[Proof]) -> None:
    assert proofs
    mark = b"parent/kernel-0="
    time.sleep(0.1)
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                left.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    assert [line for line in left if b"attnimg.verification" in line] == []


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\xff\xfe", b"[1]", b'"x"', b"3", b"null", b'{"begin": "x"}', b'{"pid": 8}', b"{",
        b"[" * 100_000, b'{"pid": "7"}',
    ],
)  # fmt: skip
def test_lines_that_are_no_report_of_the_child_are_ignored(line: bytes) -> None:
    assert _message(line, pid=7) == {}


def test_a_report_of_the_child_is_read() -> None:
    assert _message(b'{"begin": "x", "pid": 7}', pid=7) == {"begin": "x", "pid": 7}

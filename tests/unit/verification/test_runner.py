"""Test that the parent returns a proof of each kernel, whatever a kernel does to its process."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from run_facts import a_geometry
from served_kernels import prove_all

from attnimg.run_facts import Proof
from attnimg.verification.runner import _message

SOURCES = Path(__file__).parents[2] / "fixtures/wrong_kernels"
GEOMETRY = a_geometry(
    heads=2, kv_heads=2, head_dim_qk=16, head_dim_v=16, packing=True, dense=False, sequence_len=64
)
# The fault of a kernel, its file, and the code of the reason; None where the proof passes.
FAULTS = [
    ("garbage", "parent", None),
    ("a forged proof", "parent", None),
    ("a long line", "parent", None),
    ("forks", "parent", "process-state"),
    ("a daemon", "parent", "process-state"),
    ("none", "parent", None),
    ("closes everything", "parent", "crash"),
    ("cwd", "state", "process-state"),
    ("none", "state", None),
    ("floods", "parent", "process-state"),
    ("leaves a fork behind", "parent", "crash"),
    ("dies of a real-time signal", "parent", "crash"),
]
NAMES = [f"parent/kernel-{number}" for number in range(len(FAULTS))]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> list[Proof]:
    rows = zip(NAMES, FAULTS, strict=True)
    kernels = {name: (SOURCES / f"{file}.py", fault, GEOMETRY) for name, (fault, file, _) in rows}
    return [*prove_all(tmp_path_factory.mktemp("kernels"), kernels).values()]


pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("place", range(len(FAULTS)), ids=[fault for fault, _, _ in FAULTS])
def test_the_parent_returns_a_proof_of_each_kernel(proofs: list[Proof], place: int) -> None:
    _, _, code = FAULTS[place]
    proof = proofs[place]
    assert proof.backend == NAMES[place]
    assert [reason.code for reason in proof.reasons] == ([code] if code else [])


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

"""Freed memory stays in the process while it trains on a CPU, unless the user decides otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Allocates, fills and frees 8 blocks of 8 MiB, 20 times; prints the page faults per time, those
# after the block too, and how many MiB the end of the block returned.
PROGRAM = """
import ctypes, os, resource
from contextlib import suppress
from pathlib import Path
from attnimg.train.freed_memory import keep_freed_memory
MIB = 1 << 20
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: each fault is one page
def step():
    blocks = [bytearray(8 * MIB) for _ in range(8)]
    for block in blocks:
        block[::4096] = b"x" * (8 * MIB // 4096)
def faults():
    step(), step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20
def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB
with suppress(KeyboardInterrupt), keep_freed_memory(os.environ, cpu=CPU):
    inside, before = faults(), resident()
    if STOPPED:
        raise KeyboardInterrupt
returned = before - resident()
print(inside, faults(), round(returned))
"""
# Page faults of a step that gets all of its memory from the system, and of one that gets nearly
# none; other allocations of Python cause some.
ALL, NONE = 64 * 256, 64


def measure(environ: dict[str, str], *, cpu: bool, stopped: bool = False) -> tuple[int, int, int]:
    """Run the program; return what it prints."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("MALLOC_", "GLIBC_"))}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("CPU", str(cpu)).replace("STOPPED", str(stopped))],
        env=kept | {"PYTHONPATH": str(Path(__file__).parents[2])} | environ,
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    inside, after, returned = map(int, done.stdout.split())
    return inside, after, returned


@pytest.mark.parametrize(
    "stopped", [pytest.param(False, id="ended"), pytest.param(True, id="stopped")]
)
def test_a_step_on_a_cpu_gets_the_memory_of_the_step_before(stopped: bool) -> None:
    inside, _, returned = measure({}, cpu=True, stopped=stopped)
    assert inside < NONE
    # The program goes on with as little memory as if it had not trained.
    assert returned > 48


@pytest.mark.parametrize(
    ("environ", "cpu"),
    [
        pytest.param({}, False, id="on a GPU"),
        pytest.param({"MALLOC_TRIM_THRESHOLD_": "131072"}, True, id="a variable of glibc"),
        pytest.param({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, True, id="tunables"),
    ],
)
def test_nothing_changes(environ: dict[str, str], cpu: bool) -> None:
    inside, after, _ = measure(environ, cpu=cpu)
    assert inside > ALL // 2
    assert abs(inside - after) < ALL // 8

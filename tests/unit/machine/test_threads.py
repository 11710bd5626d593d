"""OpenMP's threads, and how they wait, by affinity, quota, load and what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnimg.machine import threads
from attnimg.machine.threads import (
    SET_HERE,
    count_threads,
    cpu_load,
    proof_settings,
    read_threads,
    set_threads,
    set_without_load,
    thread_settings,
)


@pytest.mark.parametrize(
    ("cpus", "processes", "number"),
    [
        (64, 1, 64), (2, 1, 2), (1.9, 1, 1), (1, 1, 1), (0.5, 1, 1), (0.01, 1, 1),
        (8, 4, 2), (8, 3, 2), (2, 8, 1), (3.5, 1, 3), (8, 0, 8),
    ],
)  # fmt: skip
def test_number_of_threads(cpus: float, processes: int, number: int) -> None:
    assert count_threads(cpus=cpus, processes=processes) == number


@pytest.fixture
def cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 8 CPUs and no quota."""
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "8"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "7"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "6"}, {"GOMP_SPINCOUNT": "30000"}),
        # train refuses these, and doctor warns.
        ({"OMP_NUM_THREADS": "x"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "9" * 5000}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": ""}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": " "}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"MKL_NUM_THREADS": "8"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"MKL_NUM_THREADS": ""}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"MKL_NUM_THREADS": "x"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_THREAD_LIMIT": "64"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_THREAD_LIMIT": "2"}, {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "30000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "8"}),
        ({"GOMP_SPINCOUNT": "1"}, {"OMP_NUM_THREADS": "8"}),
        ({"GOMP_SPINCOUNT": ""}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"KMP_BLOCKTIME": "0"}, {"OMP_NUM_THREADS": "8"}),
        ({"KMP_AFFINITY": "compact"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"KMP_INIT_AT_FORK": "0"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"KMP_HW_SUBSET": "1s,4c"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"KMP_DUPLICATE_LIB_OK": "TRUE"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "30000"}),
        ({"LOCAL_WORLD_SIZE": "x"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        (
            {"LOCAL_WORLD_SIZE": "9" * 5000},
            {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"},
        ),
        ({"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "passive"}, {}),
    ],
)
def test_what_the_user_sets_is_kept(environ: dict[str, str], settings: dict[str, str]) -> None:
    assert thread_settings(environ, load=2.0) == settings


@pytest.mark.usefixtures("cpus")
def test_what_another_process_of_attnimg_has_set_is_chosen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ: dict[str, str] = {}
    monkeypatch.setattr(threads, "cpu_load", lambda: 2.0)
    set_threads(environ)
    assert environ[SET_HERE] == "OMP_NUM_THREADS=8 GOMP_SPINCOUNT=3000"
    worker = environ | {"LOCAL_WORLD_SIZE": "4"}
    monkeypatch.setattr(threads, "cpu_load", lambda: 0.0)
    set_threads(worker)
    assert worker == {
        "LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "30000",
        SET_HERE: "OMP_NUM_THREADS=2 GOMP_SPINCOUNT=30000",
    }  # fmt: skip
    assert proof_settings(worker)["OMP_NUM_THREADS"] == "2"
    # What the user changes is the user's.
    changed = environ | {"OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "7", "LOCAL_WORLD_SIZE": "4"}
    set_threads(changed)
    assert (changed["OMP_NUM_THREADS"], changed["GOMP_SPINCOUNT"]) == ("3", "7")
    waiting = environ | {"KMP_BLOCKTIME": "0"}
    set_threads(waiting)
    assert waiting["OMP_NUM_THREADS"] == "8", "how threads wait does not remove their number"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8", 8), (" 8 ", 8), ("08", 8), ("8,2", 8), ("4, 2", 4), ("", None), (" ", None),
        ("abc", None), ("-1", None), ("0", None), ("8,", None), ("8,x", None), ("1.5", None),
        ("٨", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_a_number_of_threads_is_read_as_openmp_reads_it(text: str, number: int | None) -> None:
    assert read_threads(text) == number


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize("mark", ["", "x", "=", "HOME=/", "OMP_NUM_THREADS", "OMP_NUM_THREADS=8"])
def test_a_mark_removes_nothing_else(mark: str) -> None:
    environ = {SET_HERE: mark, "HOME": "/", "OMP_NUM_THREADS": "6"}
    set_without_load(environ)
    assert (environ["HOME"], environ["OMP_NUM_THREADS"]) == ("/", "6")


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "30000"),
        ({"MKL_NUM_THREADS": "2"}, "30000"),
        ({"GOMP_SPINCOUNT": "3000", SET_HERE: "GOMP_SPINCOUNT=3000"}, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "passive"}, None),
        ({"KMP_BLOCKTIME": "0"}, None),
    ],
    ids=["none", "a number of the user", "the entrypoint's", "the user's", "passive", "LLVM's"],
)
def test_without_the_load_threads_wait_as_on_an_idle_machine(
    given: dict[str, str], spins: str | None
) -> None:
    environ = dict(given)
    set_without_load(environ)
    assert environ.get("GOMP_SPINCOUNT") == spins
    before = dict(environ)
    set_without_load(environ)
    assert environ == before, "a child would get other values"


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("load", "spins"),
    [(0.0, "30000"), (0.2, "30000"), (0.5, "3000"), (2.0, "3000"), (8.0, "3000")],
)
def test_threads_never_wait_as_long_as_by_default(load: float, spins: str) -> None:
    settings = thread_settings({}, load=load)
    assert settings["GOMP_SPINCOUNT"] == spins
    assert settings["OMP_NUM_THREADS"] == "8", "the load decides no number"


def stat(*busy: int, after: int = 0) -> str:
    lines = ["cpu  1 2 3 4 5 6 7 8 0 0"]
    for cpu, ticks in enumerate(busy):
        lines.append(f"cpu{cpu} {ticks * after} 0 0 {(10 - ticks) * after} 0 0 0 0 0 0")
    return "\n".join([*lines, "intr 1 2", "", "cpuX 1", "cpu7"]) + "\n"


@pytest.mark.parametrize(
    ("busy", "load"), [((0, 0), 0.0), ((10, 10), 2.0), ((10, 0), 1.0), ((5, 2), 0.7)]
)
def test_the_load_is_that_of_the_cpus_in_the_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, busy: tuple[int, ...], load: float
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    path = tmp_path / "stat"
    path.write_text(stat(*busy, 10))
    monkeypatch.setattr(time, "sleep", lambda _: path.write_text(stat(*busy, 10, after=1)))
    assert cpu_load(path) == pytest.approx(load)


def test_a_busy_process_is_part_of_the_load() -> None:
    """Pin a busy process to one CPU of this machine, and measure that CPU."""
    cpu = max(os.sched_getaffinity(0))
    command = f"import os; os.sched_setaffinity(0, {{{cpu}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        own = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {cpu})
            assert cpu_load(seconds=0.5) > 0.7
        finally:
            os.sched_setaffinity(0, own)
            process.kill()


def test_without_proc_stat_there_is_no_load(tmp_path: Path) -> None:
    assert cpu_load(tmp_path / "stat", seconds=0) == 0.0


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "infinite"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}, {}),
    ],
)
def test_a_proof_never_spends_its_time_limit_on_waiting(
    environ: dict[str, str], settings: dict[str, str]
) -> None:
    assert proof_settings(environ) == settings


def test_a_mask_of_one_cpu_gives_one_thread() -> None:
    command = "import attnimg.machine.threads as t; print(t.thread_settings({}, load=0))"
    mask = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        [sys.executable, "-c", command],
        preexec_fn=lambda: os.sched_setaffinity(0, mask),
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'OMP_NUM_THREADS': '1'" in done.stdout


@pytest.mark.parametrize(
    ("variables", "spins"), [({}, str(threads.SPINS_BUSY)), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_torch_starts_with_these_variables(variables: dict[str, str], spins: str) -> None:
    """The library itself prints its settings, which it reads when torch loads it."""
    program = (
        "import os; from attnimg.machine.threads import proof_settings;"
        "os.environ |= proof_settings(os.environ);"
        "import torch; torch.ones(1 << 20).sum();"
        "print(torch.get_num_threads(), os.environ['OMP_NUM_THREADS'])"
    )
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ |= {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ | variables, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found, wanted = done.stdout.split()
    assert found == wanted
    printed = next(line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert f"'{spins}'" in printed

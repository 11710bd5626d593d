"""OpenMP's threads by affinity and quota, in trees of cgroups as kernels and engines make them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from attnimg.machine import threads
from attnimg.machine.threads import (
    cgroup_quota,
    count_threads,
    cpu_load,
    proof_settings,
    thread_settings,
)

V1 = "30 29 0:29 {top} /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct"
V2 = "30 29 0:29 {top} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup rw,nsdelegate"
HYBRID = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
OTHER = "33 31 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset"


def v1(folder: str, quota: str, period: str = "100000") -> dict[str, str]:
    place = f"sys/fs/cgroup/cpu,cpuacct{folder}"
    return {f"{place}/cpu.cfs_quota_us": f"{quota}\n", f"{place}/cpu.cfs_period_us": f"{period}\n"}


def v2(folder: str, limit: str) -> dict[str, str]:
    return {f"sys/fs/cgroup{folder}/cpu.max": f"{limit}\n"}


def write(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("own", "mounts", "files", "quota"),
    [
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000 100000"), 0.5,
                     id="v2, docker run --cpus 0.5"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "max 100000"), None,
                     id="v2, max is no quota"),
        pytest.param("0::/", [V2.format(top="/")], {}, None,
                     id="v2, the root cgroup of a machine has no cpu.max"),
        pytest.param("0::/a/b/c", [V2.format(top="/")],
                     v2("/a/b/c", "max 100000") | v2("/a/b", "300000 99000")
                     | v2("/a", "150000 100000"),
                     1.5, id="v2, nested: the smallest quota above counts"),
        pytest.param("0::/kubepods/pod1/c1", [V2.format(top="/")],
                     v2("/kubepods/pod1/c1", "25000 100000") | v2("/kubepods", "400000 100000"),
                     0.25, id="v2, nested: its own quota counts if it is smaller"),
        pytest.param("0::/../../job", [V2.format(top="/")], v2("", "200000 100000"), 2.0,
                     id="v2, a cgroup outside of its namespace"),
        pytest.param("0::/other", [V2.format(top="/docker/1")], v2("", "100000 50000"), 2.0,
                     id="v2, a mount of another cgroup than its own"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000"), None,
                     id="v2, malformed: no period"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "a b"), None, id="v2, malformed: words"),
        pytest.param("0::/", [V2.format(top="/")], v2("", "50000 0"), None,
                     id="v2, malformed: a period of 0"),
        pytest.param("0::/", [V2.format(top="/")], v2("", ""), None, id="v2, malformed: empty"),
        pytest.param("0::/a/b", [V2.format(top="/")], v2("/a/b", "?") | v2("/a", "50000 100000"),
                     0.5, id="one malformed file hides no quota above it"),
        pytest.param("4:cpu,cpuacct:/docker/1\n0::/docker/1",
                     [V1.format(top="/docker/1"), HYBRID], v1("", "50000"), 0.5,
                     id="v1 and hybrid, docker run --cpus 0.5"),
        pytest.param("4:cpuacct,cpu:/docker/1", [V1.format(top="/docker/1")], v1("", "-1"), None,
                     id="v1, -1 is no quota"),
        pytest.param("4:cpu:/a/b", [OTHER, V1.format(top="/")],
                     v1("/a/b", "-1") | v1("/a", "20000", "10000") | v1("", "-1"), 2.0,
                     id="v1, nested: the quota above counts"),
        pytest.param("4:cpu:/a/b", [V1.format(top="/")], v1("/a/b", "50000", ""), None,
                     id="v1, malformed: an empty period"),
        pytest.param("2:cpuacct:/a", [V1.format(top="/")], v1("", "50000"), None,
                     id="v1, only the controller cpu has a quota"),
        pytest.param("nonsense\n::\n", ["nonsense", "- -", ""], {}, None, id="malformed lists"),
    ],
)  # fmt: skip
def test_quota(
    tmp_path: Path, own: str, mounts: list[str], files: dict[str, str], quota: float | None
) -> None:
    lists = {"proc/self/cgroup": own + "\n", "proc/self/mountinfo": "\n".join(mounts) + "\n"}
    assert cgroup_quota(write(tmp_path, lists | files)) == quota


def test_without_proc_there_is_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


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
    monkeypatch.setattr(threads, "cgroup_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("environ", "settings"),
    [
        ({}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "8"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "7"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "6"}, {}),
        ({"OMP_NUM_THREADS": "x"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"MKL_NUM_THREADS": "8"}, {"GOMP_SPINCOUNT": "3000"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "8"}),
        ({"GOMP_SPINCOUNT": "1"}, {"OMP_NUM_THREADS": "8"}),
        ({"KMP_BLOCKTIME": "0"}, {}),
        ({"KMP_DUPLICATE_LIB_OK": "TRUE"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"LOCAL_WORLD_SIZE": "4"}, {"OMP_NUM_THREADS": "2"}),
        ({"LOCAL_WORLD_SIZE": "x"}, {"OMP_NUM_THREADS": "8", "GOMP_SPINCOUNT": "3000"}),
        ({"OMP_NUM_THREADS": "8", "OMP_WAIT_POLICY": "passive"}, {}),
    ],
)
def test_what_the_user_sets_is_kept(environ: dict[str, str], settings: dict[str, str]) -> None:
    assert thread_settings(environ, load=2.0) == settings


@pytest.mark.usefixtures("cpus")
@pytest.mark.parametrize(
    ("load", "bounded"), [(0.0, False), (0.2, False), (0.5, True), (2.0, True), (8.0, True)]
)
def test_threads_wait_as_by_default_on_an_idle_machine_alone(load: float, bounded: bool) -> None:
    settings = thread_settings({}, load=load)
    assert ("GOMP_SPINCOUNT" in settings) == bounded
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
    ("variables", "spins"), [({}, str(threads.SPINS)), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
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

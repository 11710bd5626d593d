"""Set OpenMP's number of threads, and how they wait, for the CPUs that this process may use.

OpenMP's library counts the CPUs of the affinity mask (taskset, cpuset), but not a cgroup's quota
(`docker run --cpus 0.5`, a Kubernetes limit), and its threads wait for one another in a loop of up
to 300,000 spins. With fewer free CPUs than threads, the waiting thread takes the time that the
working one needs: a proof takes 10 times as long (docs/cpu-limits.md).

    threads    the affinity mask or the quota, whichever is smaller; divided by the processes that
               torchrun started on this machine (it sets OMP_NUM_THREADS=1 itself)
    waiting    at most SPINS_IDLE spins, then asleep: another process may start during a run, and
               the library can't be told later; at most SPINS_BUSY if other processes use the CPUs
               of these threads already, since so few slow a run on an idle machine

The load does not change the number of threads: the sums of a run and of its resumption are equal
bit for bit only with the same number. Processes of a data loader are not subtracted: each computes
with one thread, and mostly sleeps.

The library reads these variables once, when torch loads it. What the user has set is kept. SET_HERE
names the variables that this module has set: a process that inherits them chooses them again, for
its own mask and LOCAL_WORLD_SIZE.

attnimg's commands and the image's entrypoint measure the load; other Python programs in an image
(machine/container.py) get the values of an idle machine, as measuring would delay each start.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from attnimg.cgroup import cpu_quota, read_lines

# The library's default is 300,000. docs/cpu-limits.md has the speeds with each of these, on an idle
# machine and with neighbours.
SPINS_IDLE = 30_000
SPINS_BUSY = 3000

# CPUs that others may use before the machine counts as busy: what a system does all the time.
_IDLE = 0.25
# Seconds in which the load is measured, ten ticks of /proc/stat.
_SAMPLE_S = 0.1

# With one of these, or MKL_NUM_THREADS, the user decides the number of threads, or how they wait;
# an empty value is as none. A wrong OMP_NUM_THREADS is kept: train and doctor report it. KMP_ is
# the prefix of LLVM's and Intel's libraries, which some of torch's builds have.
# Source: https://openmp.llvm.org/design/Runtimes.html, environment variables (2026-11-28).
_NUMBER = ("OMP_NUM_THREADS", "KMP_HW_SUBSET")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Of an int of C; the library takes no larger number.
_DIGITS = 9

# What decides the threads of a run: a receipt has their values.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# The variables that were set here, with their values: "OMP_NUM_THREADS=8 GOMP_SPINCOUNT=3000". One
# with another value was set by the user.
SET_HERE = "ATTNIMG_THREADS"


def set_threads(environ: MutableMapping[str, str]) -> None:
    """Set OpenMP's variables, before torch is imported; takes _SAMPLE_S for the load.

    Args:
        environ: os.environ, or the environment of a new process.
    """
    for name in _set_here(environ):
        del environ[name]
    _set(environ, thread_settings(environ, load=cpu_load()))


def set_without_load(environ: MutableMapping[str, str]) -> None:
    """Set OpenMP's variables as on an idle machine; how long to wait is kept if it is inherited.

    Args:
        environ: os.environ, or the environment of a new process.
    """
    idle = thread_settings(environ, load=0)
    _set(environ, idle | _set_here(environ) | _number_of_threads(environ))


def _set(environ: MutableMapping[str, str], settings: Mapping[str, str]) -> None:
    environ.update(settings)
    environ[SET_HERE] = " ".join(f"{name}={value}" for name, value in settings.items())


def _set_here(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that this process or one above it has set, and nobody has changed."""
    pairs = (text.partition("=")[::2] for text in environ.get(SET_HERE, "").split())
    return {
        name: value
        for name, value in pairs
        if name in THREAD_VARIABLES and environ.get(name) == value
    }


def thread_settings(environ: Mapping[str, str], *, load: float) -> dict[str, str]:
    """Return the variables to set; those that the user has set are not in it.

    Args:
        environ: the environment.
        load: how many of the CPUs in this process's mask other processes use.
    """
    settings = _number_of_threads(environ)
    number = settings.get("OMP_NUM_THREADS") or environ.get("OMP_NUM_THREADS", "")
    free = len(os.sched_getaffinity(0)) - load
    threads = read_threads(number) or math.inf
    if not _has_set(environ, _WAITING):
        is_busy = load > _IDLE and free < threads
        settings["GOMP_SPINCOUNT"] = str(SPINS_BUSY if is_busy else SPINS_IDLE)
    return settings


def proof_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process that proves kernels.

    Its time is limited, and another process may start meanwhile, so that its threads never wait
    longer than SPINS_BUSY, whatever is set for the run. How they wait changes no result.
    """
    settings = _number_of_threads(environ)
    if environ.get("OMP_WAIT_POLICY", "").strip().lower() != "passive":
        settings["GOMP_SPINCOUNT"] = str(SPINS_BUSY)
    return settings


def _number_of_threads(environ: Mapping[str, str]) -> dict[str, str]:
    if _has_set(environ, _NUMBER) or read_threads(environ.get("MKL_NUM_THREADS", "")):
        return {}
    processes = read_threads(environ.get("LOCAL_WORLD_SIZE", "")) or 1
    number = count_threads(cpus=usable_cpus(), processes=processes)
    limit = read_threads(environ.get("OMP_THREAD_LIMIT", "")) or number
    return {"OMP_NUM_THREADS": str(min(number, limit))}


def read_threads(text: str) -> int | None:
    """Return the number of threads in OMP_NUM_THREADS; None if OpenMP's library ignores it.

    Args:
        text: a number of 1 or more, or a list of them for nested parallel regions, "4,2".
    """
    numbers = [part.strip().lstrip("0") for part in text.split(",")]
    if all(part.isascii() and part.isdigit() and len(part) <= _DIGITS for part in numbers):
        return int(numbers[0])
    return None


def _has_set(environ: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Return whether the user has given one of these variables a value."""
    inherited = _set_here(environ)
    return any(environ.get(name, "").strip() and name not in inherited for name in names)


def cpu_load(stat: Path = Path("/proc/stat"), *, seconds: float = _SAMPLE_S) -> float:
    """Return how many of the CPUs in this process's mask others use; sleeps to measure it.

    A container sees the CPUs of its host there, and so its neighbours.

    Args:
        stat: the file with the CPUs' times.
        seconds: how long to measure.
    """
    before = _cpu_times(stat)
    time.sleep(seconds)
    after = _cpu_times(stat)
    load = 0.0
    for cpu in os.sched_getaffinity(0):
        if cpu in before and cpu in after:
            idle, total = (b - a for a, b in zip(before[cpu], after[cpu], strict=True))
            load += 1 - idle / total if total > 0 else 0.0
    return load


def _cpu_times(stat: Path) -> dict[int, tuple[int, int]]:
    """Return the idle and the total time of each CPU, in ticks.

    Source: proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal (man-pages 6.9,
    2026-11-27).
    """
    found = {}
    for line in read_lines(stat):
        name, *times = line.split() or [""]
        if name[:3] == "cpu" and name[3:].isdigit() and len(times) >= 8:
            with suppress(ValueError):
                ticks = [int(text) for text in times[:8]]
                found[int(name[3:])] = (ticks[3] + ticks[4], sum(ticks))
    return found


def count_threads(*, cpus: float, processes: int = 1) -> int:
    """Return the number of threads of one process: a part of a CPU counts only below 1."""
    return max(1, int(cpus / max(1, processes)))


def usable_cpus() -> float:
    """Return how many CPUs this process may use: those of its mask, or fewer by a quota."""
    mask = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return mask if quota is None else min(mask, quota)

"""Run compilers: as many at a time as the memory takes, through a cache; report how they died."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

# What compilers, ninja and the kernel say when memory ended. nvcc: "'cicc' died due to signal 9".
_OUT_OF_MEMORY = re.compile(
    r"died due to signal 9|Killed signal|\bKilled$|SIGKILL|signal 9\b|bad_alloc|"
    r"[Cc]annot allocate memory|virtual memory exhausted|[Oo]ut of memory"
)
# The limit and the use of a cgroup, of version 2 and of version 1.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """How a build ended.

    Attributes:
        code: its exit code.
        out_of_memory: whether what it printed says so.
        last_words: its last lines.
    """

    code: int
    out_of_memory: bool
    last_words: str


def count(memory_gb: float) -> int:
    """Return how many compilers may run at a time; JOBS, when set, decides.

    Args:
        memory_gb: what one of them may need, in GB.
    """
    if asked := os.environ.get("JOBS"):
        return max(1, int(asked))
    cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, int(memory_bytes() / (memory_gb * 1e9))))


def memory_bytes() -> int:
    """Return the memory that is free: the machine's, or less where a cgroup sets a limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    for limit, used in CGROUPS:
        if limit.exists() and (text := limit.read_text().strip()) != "max":
            free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def run(command: list[str], *, env: dict[str, str]) -> Done:
    """Run a build, passing on what it prints."""
    last: deque[str] = deque(maxlen=5)
    out_of_memory = False
    with subprocess.Popen(
        command,
        env=env,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            last.append(line.strip())
            out_of_memory |= _OUT_OF_MEMORY.search(line.rstrip()) is not None
    return Done(code=child.returncode, out_of_memory=out_of_memory, last_words=" / ".join(last))


def cache_counts(env: dict[str, str]) -> dict[str, int]:
    """Count the objects that ccache compiled and those it had; nothing where there is none."""
    try:
        done = subprocess.run(
            ["ccache", "--print-stats"], env=env, capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        return {}
    counts = dict(line.split("\t") for line in done.stdout.splitlines())
    hits = int(counts["direct_cache_hit"]) + int(counts["preprocessed_cache_hit"])
    return {"objects_compiled": int(counts["cache_miss"]), "objects_reused": hits}

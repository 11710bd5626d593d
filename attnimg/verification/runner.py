"""Run proofs in a child process; where a kernel crashes it, return that as the proof's reason.

Importing torch and transformers takes longer than a proof, so one child proves all candidates. If
one of them crashes the child, that candidate has failed, and a new child proves the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from attnimg.backends import backend_named
from attnimg.errors import signal_name
from attnimg.facts import Figure, Geometry, Proof, Reason
from attnimg.verification.training_conditions import is_compiled

# Seconds that one candidate may compute and sleep, without waiting for a CPU. On a GPU some kernels
# are compiled in their first call.
TIMEOUT_S = {"cpu": 60.0, "cuda": 300.0}

# Added to the limit where torch.compile builds a kernel for each kind of call: some 60 graphs, each
# forward and backward. Our choice: on an H200, with compilers running beside it, 153 s were too few
# (docs/gpu-runs.md, 2026-11-26).
COMPILING_S = 600.0

# The same limit for the time until the child has imported torch and transformers.
IMPORT_TIMEOUT_S = 180.0

# Seconds of wall time, for a machine so busy that the child hardly gets a CPU, or a stopped child.
WALL_S = 900.0

# Memory that a child may allocate after its imports: the longest probe on a CPU has some ten arrays
# of cases.CPU.held scores. On a GPU the probes are sized to its memory, of which a tenth is left.
MEMORY_BYTES = {"cpu": 6 << 30, "cuda": 1 << 40}

# Bytes that a child may print (into a temporary file), and bytes of the longest line of a report.
OUTPUT_BYTES = 64 << 20

_LINE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A backend to prove.

    Attributes:
        backend: its name.
        geometries: the geometries that it is proven on.
        trusted: whether the user allows code from the hub to run.
        routed: whether it is one of several that a router calls.
    """

    backend: str
    geometries: tuple[Geometry, ...]
    trusted: bool = False
    routed: bool = False


def run(
    candidates: Sequence[Candidate],
    *,
    device: str,
    timeout_s: float | None = None,
    wall_s: float = WALL_S,
    memory_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Proof]:
    """Prove candidates in a child process.

    Args:
        candidates: what to prove, in this order.
        device: "cpu" or "cuda", which decides the limits.
        timeout_s: seconds that one candidate may compute and sleep, each time it runs its probes;
            None for TIMEOUT_S, plus COMPILING_S where its kernel is compiled.
        wall_s: seconds of wall time that it may take after the child has started; COMPILING_S is
            added where its kernel is compiled.
        memory_bytes: bytes that the child may allocate; None for MEMORY_BYTES.
        say: called with each progress line; None for no output.

    Returns:
        A proof for each candidate, in the same order. An error of a kernel is a reason in its
        proof, and is not raised.
    """
    memory = MEMORY_BYTES[device] if memory_bytes is None else memory_bytes
    proofs: list[Proof] = []
    while len(proofs) < len(candidates):
        left = candidates[len(proofs) :]
        proofs += _run_child(
            left,
            limits=[
                limits_of(candidate, device=device, timeout_s=timeout_s, wall_s=wall_s)
                for candidate in left
            ],
            memory_bytes=memory,
            say=say or _silence,
        )
    return proofs


def limits_of(
    candidate: Candidate, *, device: str, timeout_s: float | None, wall_s: float
) -> tuple[float, float]:
    """Return a candidate's limits: seconds of computing and sleeping, and seconds of wall time."""
    backend = backend_named(candidate.backend)
    compiling = backend is not None and is_compiled(backend, device=device)
    extra = COMPILING_S if compiling else 0.0
    return TIMEOUT_S[device] + extra if timeout_s is None else timeout_s, wall_s + extra


def _run_child(
    candidates: Sequence[Candidate],
    *,
    limits: Sequence[tuple[float, float]],
    memory_bytes: int,
    say: Callable[[str], None],
) -> list[Proof]:
    """Prove candidates until the child has ended; return at least one proof."""
    task = {
        "candidates": [asdict(candidate) for candidate in candidates],
        "memory_bytes": memory_bytes,
    }
    proofs: list[Proof] = []
    running, case = candidates[0].backend, "starting"
    begun = time.monotonic()
    with tempfile.TemporaryFile() as noise, _Child(task, noise=noise) as child:
        watchdog = Watchdog(child.pid, limit_s=IMPORT_TIMEOUT_S, wall_s=WALL_S)
        for line in _lines(child, watchdog, noise=noise):
            message = _message(line, pid=child.pid)
            if "begin" in message:
                running, case = str(message["begin"]), "loading"
                begun = time.monotonic()
                limit_s, wall_s = limits[len(proofs)]
                watchdog.restart(limit_s=limit_s, wall_s=wall_s)
                say(f"proving {running}")
            elif "again" in message:
                limit_s, wall_s = limits[len(proofs)]
                watchdog.restart(limit_s=limit_s, wall_s=wall_s)
            elif "case" in message:
                case = str(message["case"])
            elif (proof := _proof(message)) is not None and proof.backend == running:
                proofs.append(proof)
                running, case = "", "starting"
            if len(proofs) == len(candidates) or (proofs and "stop" in message):
                return proofs
        if proofs and case == "starting":
            # The kernel of an earlier candidate ended this child; the next one proves the rest.
            return proofs
        # A kernel may close the pipe of the reports and keep running.
        while child.poll() is None and not watchdog.spent() and not _is_flooded(noise):
            time.sleep(LOOK_EVERY_S)
        late, flooded = child.poll() is None, _is_flooded(noise)
        if late:
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        if flooded:
            text = f"{case}: printed more than {OUTPUT_BYTES >> 20} MiB"
            reason = Reason(code="process-state", text=text)
        elif late:
            reason = Reason(code="timeout", text=f"{case}: {watchdog.sentence()}")
        else:
            reason = _death(status, case=case, noise=noise)
    seconds = time.monotonic() - begun
    return [*proofs, Proof(backend=running, reasons=(reason,), seconds=seconds)]


def _message(line: bytes, *, pid: int) -> dict[str, Any]:
    """Return a report of the child; {} for a line that its kernel or a forked process wrote."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) and message.get("pid") == pid else {}


def _proof(message: dict[str, Any]) -> Proof | None:
    try:
        return proof_from_json(message["proof"])
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _is_flooded(noise: IO[bytes]) -> bool:
    return os.fstat(noise.fileno()).st_size > OUTPUT_BYTES


def _silence(_text: str) -> None:
    """Print nothing."""


class _Child:
    """A child process with its task on stdin; it and all that it started are killed on exit."""

    def __init__(self, task: dict[str, Any], *, noise: IO[bytes]) -> None:
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attnimg.verification.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            # In a process group of its own: Ctrl-C reaches the parent, which then kills the group.
            start_new_session=True,
            env=os.environ | {MARK: self.mark},
        )
        self.task = json.dumps(task).encode()

    def __enter__(self) -> subprocess.Popen[bytes]:
        assert self.process.stdin is not None
        # A child that ended at once has closed the pipe; its exit status is reported.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(self.task)
            self.process.stdin.close()
        return self.process

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _kill_marked(self.mark)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _kill_marked(mark: str) -> None:
    """Kill the processes that a kernel started and that left the child's group and session."""
    # Repeated, since a process may fork during the search.
    for _ in range(3):
        found = list(processes_with(mark))
        for process in found:
            with contextlib.suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)
        if not found:
            return


def _lines(
    child: subprocess.Popen[bytes], watchdog: Watchdog, *, noise: IO[bytes]
) -> Iterator[bytes]:
    """Yield the lines of the child until it ends, closes the pipe, or exceeds a limit."""
    pending = b""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not watchdog.spent() and not _is_flooded(noise):
            if not selector.select(timeout=LOOK_EVERY_S):
                # A process that a kernel started may hold the pipe open.
                if child.poll() is not None:
                    return
                continue
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines
            # No report is this long: the line is cut, and later ignored.
            pending = pending[:_LINE_BYTES]


def _death(status: int, *, case: str, noise: IO[bytes]) -> Reason:
    """Return the reason why a child ended, from its exit status."""
    noise.seek(max(0, os.fstat(noise.fileno()).st_size - _LINE_BYTES))
    said = [line for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
    last = f": {said[-1].strip()[:200]}" if said else ""
    if status == -signal.SIGKILL:
        return Reason(code="oom", text=f"{case}: killed from outside, as for want of memory")
    if status < 0:
        name = signal_name(-status)
        return Reason(code="crash", text=f"{case}: died of {name}{last}")
    return Reason(code="crash", text=f"{case}: the process exited with {status}{last}")


def proof_from_json(values: dict[str, Any]) -> Proof:
    """Build a proof from the result of dataclasses.asdict.

    Raises:
        TypeError, KeyError: the values are not those of a proof.
    """
    reasons = tuple(Reason(**reason) for reason in values["reasons"])
    figures = tuple(Figure(**figure) for figure in values["figures"])
    return Proof(**{**values, "reasons": reasons, "figures": figures})


# Seconds between two checks of the child.
LOOK_EVERY_S = 0.1

# If the last check is longer ago, this process was stopped or got no CPU, and only this much of the
# time counts.
LONGEST_LOOK_S = 1.0

# States in /proc/PID/stat of threads that are not asleep: running or waiting for a CPU, waiting for
# the disk, stopped, and traced. Source: proc_pid_stat(5), man-pages 6.9 (2026-11-25).
_AWAKE = frozenset("RDTt")


class Usage(NamedTuple):
    """The CPU time of a process and its descendants so far, and whether all of them sleep."""

    cpu_s: float
    asleep: bool


class Watchdog:
    """The time limits of a child, which restart for each candidate.

    Args:
        pid: the child.
        limit_s: seconds of computing and sleeping that it may take.
        wall_s: seconds of wall time that it may take, the wait for a CPU included.
    """

    def __init__(self, pid: int, *, limit_s: float, wall_s: float) -> None:
        self.pid = pid
        self.restart(limit_s=limit_s, wall_s=wall_s)

    def restart(self, *, limit_s: float, wall_s: float) -> None:
        """Restart the clocks, with other limits."""
        self.limit_s, self.wall_s = limit_s, wall_s
        self.own_s = self.passed_s = 0.0
        self._looked = time.monotonic()
        self._cpu_s = usage_of(self.pid).cpu_s

    def spent(self) -> bool:
        """Return whether a limit is exceeded; check the child at most every LOOK_EVERY_S."""
        since = time.monotonic() - self._looked
        if since >= LOOK_EVERY_S:
            usage = usage_of(self.pid)
            since = min(since, LONGEST_LOOK_S)
            self.passed_s += since
            self.own_s += own_time(since, cpu_s=usage.cpu_s - self._cpu_s, asleep=usage.asleep)
            self._looked, self._cpu_s = time.monotonic(), usage.cpu_s
        return self.own_s >= self.limit_s or self.passed_s >= self.wall_s

    def sentence(self) -> str:
        """Return a text on the limit that was exceeded."""
        if self.own_s >= self.limit_s:
            return f"still running after {self.limit_s:g} s"
        return f"still running after {self.wall_s:g} s, {self.own_s:.0f} s of them with a CPU"


def own_time(since: float, *, cpu_s: float, asleep: bool) -> float:
    """Return how many seconds of an interval count as computing or sleeping.

    Args:
        since: seconds of wall time.
        cpu_s: seconds of CPU time in the interval, of all threads.
        asleep: whether none of its threads wanted a CPU at the end.
    """
    return since if asleep else min(since, max(cpu_s, 0.0))


def usage_of(pid: int) -> Usage:
    """Return the CPU time of a process and its descendants, and whether all of them sleep."""
    ticks, awake = 0, False
    for process in _tree(Path("/proc") / str(pid)):
        # The files of a process that ends meanwhile disappear.
        with contextlib.suppress(OSError):
            fields = _fields(process)
            # utime and stime, of the process and of its children that were waited for.
            ticks += sum(map(int, fields[11:15]))
            awake = awake or any(_fields(task)[0] in _AWAKE for task in process.glob("task/*"))
    return Usage(cpu_s=ticks / os.sysconf("SC_CLK_TCK"), asleep=not awake)


def _tree(process: Path) -> Iterator[Path]:
    yield process
    for listed in process.glob("task/*/children"):
        with contextlib.suppress(OSError):
            for pid in listed.read_text(encoding="ascii").split():
                yield from _tree(process.parent / pid)


def _fields(process: Path) -> list[str]:
    """Return the fields of a stat file after the name, which may have spaces and brackets."""
    return (
        (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )


MARK = "ATTNIMG_PROOF"


def processes_with(mark: str) -> Iterator[Path]:
    """Yield the folders in /proc of the processes that were started with a mark."""
    entry = f"{MARK}={mark}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        # The process may be another user's, or may have ended.
        with suppress(OSError):
            if entry in (process / "environ").read_bytes().split(b"\0"):
                yield process


def count_forks() -> int:
    """Return the number of running forks of this process: others with its mark and command."""
    mark = os.environ.get(MARK)
    if mark is None:
        return 0
    own = Path("/proc/self/cmdline").read_bytes()
    found = 0
    for process in processes_with(mark):
        with suppress(OSError):
            alike = (process / "cmdline").read_bytes() == own
            found += alike and int(process.name) != os.getpid()
    return found

"""Run proofs in a child process; where a kernel crashes it, return that as the proof's reason.

Importing torch and transformers takes longer than a proof, so one child proves all candidates. If
one of them crashes the child, that candidate has failed, and a new child proves the rest.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from attnimg.backends import find_backend
from attnimg.cgroup import memory_limit, oom_kills
from attnimg.errors import signal_name
from attnimg.machine.threads import proof_settings
from attnimg.run_facts import Figure, Geometry, LayersTask, OptimizerTask, Proof, QatTask, Reason
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
# of cases.CPU.stored_scores numbers. On a GPU the probes are sized to its memory, less a tenth.
MEMORY_BYTES = {"cpu": 6 << 30, "cuda": 1 << 40}

# Bytes that a child may print (into a temporary file), and bytes of the longest line of a report.
OUTPUT_BYTES = 64 << 20

_LINE_BYTES = 1 << 20

# The largest number of files in a working folder for which a child gets a folder with links.
MOST_LINKS = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A backend to prove.

    Attributes:
        backend: its name.
        geometries: the geometries that it is proven on.
        trusted: whether the user allows code from the hub to run.
        routed: whether it is one of several that a router calls.
        task: what is proven instead of a backend: layers, an optimizer or fake quantizers;
            `backend` is its name.
    """

    backend: str
    geometries: tuple[Geometry, ...]
    trusted: bool = False
    routed: bool = False
    task: LayersTask | OptimizerTask | QatTask | None = None


def run(
    candidates: Sequence[Candidate],
    *,
    device: str,
    timeout_s: float | None = None,
    wall_s: float = WALL_S,
    memory_bytes: int | None = None,
    log: Callable[[str], None] | None = None,
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
        log: called with each progress line; None for no output.

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
                time_limits(candidate, device=device, timeout_s=timeout_s, wall_s=wall_s)
                for candidate in left
            ],
            memory_bytes=memory,
            log=log or (lambda _text: None),
        )
    return proofs


def time_limits(
    candidate: Candidate, *, device: str, timeout_s: float | None, wall_s: float
) -> Limits:
    """Return the time limits of a candidate."""
    backend = find_backend(candidate.backend)
    compiling = backend is not None and is_compiled(backend, device=device)
    extra = COMPILING_S if compiling else 0.0
    limit_s = TIMEOUT_S[device] + extra if timeout_s is None else timeout_s
    return Limits(limit_s, wall_s + extra)


def _run_child(
    candidates: Sequence[Candidate],
    *,
    limits: Sequence[Limits],
    memory_bytes: int,
    log: Callable[[str], None],
) -> list[Proof]:
    """Prove candidates until the child has ended; return at least one proof."""
    proofs: list[Proof] = []
    running, case = candidates[0].backend, "starting"
    begun, kills = time.monotonic(), oom_kills()
    with ExitStack() as stack:
        output = stack.enter_context(tempfile.TemporaryFile())
        task = {
            "candidates": [asdict(candidate) for candidate in candidates],
            "memory_bytes": memory_bytes,
            "folder": str(stack.enter_context(working_folder())),
        }
        child = stack.enter_context(_start_child(task, output=output))
        watchdog = Watchdog(child.pid, Limits(IMPORT_TIMEOUT_S, WALL_S))
        for line in _lines(child, watchdog, output=output):
            message = _message(line, pid=child.pid)
            if "begin" in message:
                running, case = str(message["begin"]), "loading"
                begun = time.monotonic()
                watchdog.restart(limits[len(proofs)])
                log(f"proving {running}")
            elif "again" in message:
                watchdog.restart(limits[len(proofs)])
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
        while child.poll() is None and not watchdog.expired() and not _exceeds_output(output):
            time.sleep(CHECK_EVERY_S)
        timed_out, too_much_output = child.poll() is None, _exceeds_output(output)
        if timed_out:
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        if too_much_output:
            text = f"{case}: printed more than {OUTPUT_BYTES >> 20} MiB"
            reason = Reason(code="process-state", text=text)
        elif timed_out:
            reason = Reason(code="timeout", text=f"{case}: {watchdog.description()}")
        else:
            reason = _exit_reason(status, case=case, output=output, kills=kills)
    seconds = time.monotonic() - begun
    return [*proofs, Proof(backend=running, reasons=(reason,), seconds=seconds)]


@contextmanager
def working_folder() -> Iterator[Path]:
    """Make a folder with links to the files of the working folder, for a child to work in.

    Files that its kernels create there do not stay in the user's folder. A working folder with more
    than MOST_LINKS files is used itself, and so is one whose links do not fit on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="attnimg-proof-", ignore_cleanup_errors=True) as made:
        try:
            files = list(itertools.islice(Path.cwd().iterdir(), MOST_LINKS + 1))
        except OSError:  # it was removed, or this user may not list it
            files = []
        if len(files) <= MOST_LINKS and _link(files, Path(made)):
            yield Path(made)
        else:
            yield Path.cwd()


def _link(files: Sequence[Path], folder: Path) -> bool:
    """Put links to files into a folder; return False where the disk is full."""
    try:
        for file in files:
            (folder / file.name).symlink_to(file)
    except OSError:
        return False
    return True


def _absolute_paths(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that have relative paths, with absolute ones."""
    try:
        here = Path.cwd()
    except OSError:  # it was removed
        return {}
    found = {
        name: str(here / value)
        for name, value in environ.items()
        if value.startswith(("./", "../"))
    }
    kernels = [entry.partition("=") for entry in environ.get("LOCAL_KERNELS", "").split(":")]
    if any(path for _, _, path in kernels):
        entries = [f"{name}={here / path}" if path else name for name, _, path in kernels]
        found["LOCAL_KERNELS"] = ":".join(entries)
    return found


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


def _exceeds_output(output: IO[bytes]) -> bool:
    return os.fstat(output.fileno()).st_size > OUTPUT_BYTES


@contextmanager
def _start_child(task: dict[str, Any], *, output: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a child process with a task on stdin; after the block, kill all that it started."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "attnimg.verification.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        # In a process group of its own: Ctrl-C reaches the parent, which then kills the group.
        start_new_session=True,
        env=os.environ | _absolute_paths(os.environ) | proof_settings(os.environ) | {MARK: mark},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        # A child that ended at once has closed the pipe; its exit status is reported.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task).encode())
            process.stdin.close()
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _kill_marked(mark)
        process.stdout.close()


def _kill_marked(mark: str) -> None:
    """Kill the processes that a kernel started and that left the child's group and session."""
    # Repeated, since a process may fork during the search.
    for _ in range(3):
        found = list(find_processes(mark))
        for process in found:
            with suppress(OSError):
                os.kill(int(process.name), signal.SIGKILL)
        if not found:
            return


def _lines(
    child: subprocess.Popen[bytes], watchdog: Watchdog, *, output: IO[bytes]
) -> Iterator[bytes]:
    """Yield the lines of the child until it ends, closes the pipe, or exceeds a limit."""
    pending = b""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not watchdog.expired() and not _exceeds_output(output):
            if not selector.select(timeout=CHECK_EVERY_S):
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


def _exit_reason(status: int, *, case: str, output: IO[bytes], kills: int) -> Reason:
    """Return the reason why a child ended, from its exit status.

    Args:
        status: of the child.
        case: what it was computing.
        output: what it printed.
        kills: oom_kills() before it started.
    """
    output.seek(max(0, os.fstat(output.fileno()).st_size - _LINE_BYTES))
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    last = f": {lines[-1].strip()[:200]}" if lines else ""
    if status == -signal.SIGKILL:
        why = "probably because memory ran out"
        if (limit := memory_limit()) is not None and oom_kills() > kills:
            why = f"as the memory limit of the container or job, {limit >> 20:,} MiB, was reached"
        return Reason(code="oom", text=f"{case}: killed by SIGKILL, {why}")
    if status < 0:
        name = signal_name(-status)
        return Reason(code="crash", text=f"{case}: killed by {name}{last}")
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
CHECK_EVERY_S = 0.1

# If the last check is longer ago, this process was stopped or got no CPU, and only this much of the
# time counts.
LONGEST_CHECK_S = 1.0

# States in /proc/PID/stat of threads that are not asleep: running or waiting for a CPU, waiting for
# the disk, stopped, and traced. Source: proc_pid_stat(5), man-pages 6.9 (2026-11-25).
_AWAKE = frozenset("RDTt")


class Limits(NamedTuple):
    """Time limits of a candidate.

    Attributes:
        limit_s: seconds of computing and sleeping.
        wall_s: seconds of wall time, the wait for a CPU included.
    """

    limit_s: float
    wall_s: float


class Usage(NamedTuple):
    """The CPU time of a process and its descendants so far, and whether all of them sleep."""

    cpu_s: float
    asleep: bool


class Watchdog:
    """The time limits of a child, which restart for each candidate.

    psutil returns the state of a process's main thread only; here all threads count, since a kernel
    may compute in others while the main thread waits.

    Args:
        pid: the child.
        limits: what it may take.
    """

    def __init__(self, pid: int, limits: Limits) -> None:
        self.pid = pid
        self.restart(limits)

    def restart(self, limits: Limits) -> None:
        """Restart the clocks, with other limits."""
        self.limits = limits
        self.counted_s = self.elapsed_s = 0.0
        self._checked_at = time.monotonic()
        self._cpu_s = read_usage(self.pid).cpu_s

    def expired(self) -> bool:
        """Return whether a limit is exceeded; check the child at most every CHECK_EVERY_S."""
        since = time.monotonic() - self._checked_at
        if since >= CHECK_EVERY_S:
            usage = read_usage(self.pid)
            since = min(since, LONGEST_CHECK_S)
            self.elapsed_s += since
            self.counted_s += counted_time(
                since, cpu_s=usage.cpu_s - self._cpu_s, asleep=usage.asleep
            )
            self._checked_at, self._cpu_s = time.monotonic(), usage.cpu_s
        return self.counted_s >= self.limits.limit_s or self.elapsed_s >= self.limits.wall_s

    def description(self) -> str:
        """Return which limit was exceeded."""
        if self.counted_s >= self.limits.limit_s:
            return f"still running after {self.limits.limit_s:g} s"
        wall_s, cpu_s = self.limits.wall_s, self.counted_s
        return f"still running after {wall_s:g} s, {cpu_s:.0f} s of them with a CPU"


def counted_time(since: float, *, cpu_s: float, asleep: bool) -> float:
    """Return how many seconds of an interval count as computing or sleeping.

    Args:
        since: seconds of wall time.
        cpu_s: seconds of CPU time in the interval, of all threads.
        asleep: whether none of its threads wanted a CPU at the end.
    """
    return since if asleep else min(since, max(cpu_s, 0.0))


def read_usage(pid: int) -> Usage:
    """Return the CPU time of a process and its descendants, and whether all of them sleep."""
    ticks, awake = 0, False
    for process in _tree(Path("/proc") / str(pid)):
        # The files of a process that ends meanwhile disappear.
        with suppress(OSError):
            fields = _fields(process)
            # utime and stime, of the process and of its children that were waited for.
            ticks += sum(map(int, fields[11:15]))
            awake = awake or any(_fields(task)[0] in _AWAKE for task in process.glob("task/*"))
    return Usage(cpu_s=ticks / os.sysconf("SC_CLK_TCK"), asleep=not awake)


def _tree(process: Path) -> Iterator[Path]:
    yield process
    for listed in process.glob("task/*/children"):
        with suppress(OSError):
            for pid in listed.read_text(encoding="ascii").split():
                yield from _tree(process.parent / pid)


def _fields(process: Path) -> list[str]:
    """Return the fields of a stat file after the name, which may have spaces and brackets."""
    return (
        (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    )


MARK = "ATTNIMG_PROOF"


def find_processes(mark: str) -> Iterator[Path]:
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
    for process in find_processes(mark):
        with suppress(OSError):
            alike = (process / "cmdline").read_bytes() == own
            found += alike and int(process.name) != os.getpid()
    return found

"""Run proofs in a child process, and turn its death into a reason.

Importing torch and transformers takes longer than a proof, so one child proves all candidates. When
one of them kills it, that one has failed, and another child goes on with the rest.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from attnimg.facts import Figure, Geometry, Proof, Reason

# Seconds that one candidate may take. On a GPU some kernels are compiled in their first call.
TIMEOUT_S = {"cpu": 60.0, "cuda": 300.0}
# Seconds until the child has imported torch and transformers, on a busy machine.
IMPORT_TIMEOUT_S = 180.0
# What a child may allocate besides what its imports take: the longest probe holds some ten arrays
# of BUDGET scores.
MEMORY_BYTES = {"cpu": 6 << 30, "cuda": 32 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What to prove.

    Attributes:
        backend: its name.
        geometries: what it is proven on.
        trusted: whether the user lets code from the hub run.
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
    memory_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Proof]:
    """Prove candidates in a child process.

    Args:
        candidates: what to prove, in this order.
        device: "cpu" or "cuda", which decides the limits.
        timeout_s: seconds for one candidate; None for TIMEOUT_S.
        memory_bytes: what the child may allocate; None for MEMORY_BYTES.
        say: told what is being run, for a progress line; None for silence.

    Returns:
        A proof for each candidate, in the same order. Nothing that a kernel does is raised here.
    """
    limit = TIMEOUT_S[device] if timeout_s is None else timeout_s
    memory = MEMORY_BYTES[device] if memory_bytes is None else memory_bytes
    proofs: list[Proof] = []
    while len(proofs) < len(candidates):
        left = candidates[len(proofs) :]
        proofs += _run_child(left, timeout_s=limit, memory_bytes=memory, say=say or _silence)
    return proofs


def _run_child(
    candidates: Sequence[Candidate],
    *,
    timeout_s: float,
    memory_bytes: int,
    say: Callable[[str], None],
) -> list[Proof]:
    """Prove candidates until the child is done or dead; at least one proof comes back."""
    task = {
        "candidates": [asdict(candidate) for candidate in candidates],
        "timeout_s": timeout_s,
        "memory_bytes": memory_bytes,
    }
    proofs: list[Proof] = []
    running, case = candidates[0].backend, "starting"
    begun = time.monotonic()
    with tempfile.TemporaryFile() as noise, _Child(task, noise=noise) as child:
        assert child.stdout is not None
        clock = _Clock(deadline=time.monotonic() + IMPORT_TIMEOUT_S)
        for line in _lines(child.stdout, clock):
            message = json.loads(line)
            if "begin" in message:
                running, case = message["begin"], "loading"
                begun = time.monotonic()
                clock.deadline = begun + timeout_s
                say(f"proving {running}")
            elif "case" in message:
                case = message["case"]
            else:
                proofs.append(proof_from_json(message["proof"]))
        if len(proofs) == len(candidates):
            return proofs
        late = time.monotonic() >= clock.deadline
        if late:
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        reason = _death(status, late=late, case=case, timeout_s=timeout_s, noise=noise)
    seconds = time.monotonic() - begun
    return [*proofs, Proof(backend=running, reasons=(reason,), seconds=seconds)]


@dataclass(slots=True)
class _Clock:
    """When patience ends; it moves on with each candidate."""

    deadline: float


def _silence(_text: str) -> None:
    """Say nothing."""


class _Child:
    """A child with its task on stdin; killed with all its own when the block is left."""

    def __init__(self, task: dict[str, Any], *, noise: IO[bytes]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "attnimg.prove.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            # A group of its own: Ctrl-C reaches the parent, which then ends the whole group.
            start_new_session=True,
        )
        self.task = json.dumps(task).encode()

    def __enter__(self) -> subprocess.Popen[bytes]:
        assert self.process.stdin is not None
        # A child that died at once has closed the pipe; its exit status says so.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(self.task)
            self.process.stdin.close()
        return self.process

    def __exit__(self, *_error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _lines(stream: IO[bytes], clock: _Clock) -> Iterator[bytes]:
    """Yield whole lines until the stream ends or the deadline, which may move, has passed."""
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (left := clock.deadline - time.monotonic()) > 0:
            if not selector.select(timeout=left):
                continue
            chunk = os.read(stream.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines


def _death(status: int, *, late: bool, case: str, timeout_s: float, noise: IO[bytes]) -> Reason:
    """Say what a child died of."""
    if late or status == -signal.SIGALRM:
        return Reason(code="timeout", text=f"{case}: still running after {timeout_s:g} s")
    noise.seek(0)
    said = [line for line in noise.read().decode(errors="replace").splitlines() if line.strip()]
    last = f": {said[-1].strip()[:200]}" if said else ""
    if status == -signal.SIGKILL:
        return Reason(code="oom", text=f"{case}: killed from outside, as for want of memory")
    if status < 0:
        name = signal.Signals(-status).name
        return Reason(code="crash", text=f"{case}: died of {name}{last}")
    return Reason(code="crash", text=f"{case}: the process exited with {status}{last}")


def proof_from_json(values: dict[str, Any]) -> Proof:
    """Make a proof of what dataclasses.asdict made of one.

    Raises:
        TypeError, KeyError: the values are no proof.
    """
    reasons = tuple(Reason(**reason) for reason in values["reasons"])
    figures = tuple(Figure(**figure) for figure in values["figures"])
    return Proof(**{**values, "reasons": reasons, "figures": figures})

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

from attnimg.backends import backend_named
from attnimg.facts import Figure, Geometry, Proof, Reason
from attnimg.prove.compiled import is_compiled
from attnimg.prove.patience import LOOK_EVERY_S, Patience

# Seconds that one candidate may compute and sleep. On a GPU some kernels are compiled in their
# first call.
TIMEOUT_S = {"cpu": 60.0, "cuda": 300.0}
# The same besides, where torch.compile makes a kernel for each kind of call: some 60 graphs, each
# forward and backward. Ours: on an H200, beside compilers, 153 s were too few (docs/gpu-runs.md,
# 2026-11-26).
COMPILING_S = 600.0
# The same until the child has imported torch and transformers.
IMPORT_TIMEOUT_S = 180.0
# Seconds in all, on a machine so busy that the child hardly gets a CPU, or where it was stopped.
WALL_S = 900.0
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
    wall_s: float = WALL_S,
    memory_bytes: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Proof]:
    """Prove candidates in a child process.

    Args:
        candidates: what to prove, in this order.
        device: "cpu" or "cuda", which decides the limits.
        timeout_s: seconds that one candidate may compute and sleep, as often as it runs its
            probes; None for TIMEOUT_S, and COMPILING_S where its kernel is compiled.
        wall_s: seconds that it may take in all, once the child has started; COMPILING_S besides.
        memory_bytes: what the child may allocate; None for MEMORY_BYTES.
        say: told what is being run, for a progress line; None for silence.

    Returns:
        A proof for each candidate, in the same order. Nothing that a kernel does is raised here.
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
    """Return the seconds of its own, and in all, that a candidate may take for its probes."""
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
    """Prove candidates until the child is done or dead; at least one proof comes back."""
    task = {
        "candidates": [asdict(candidate) for candidate in candidates],
        "memory_bytes": memory_bytes,
    }
    proofs: list[Proof] = []
    running, case = candidates[0].backend, "starting"
    begun = time.monotonic()
    with tempfile.TemporaryFile() as noise, _Child(task, noise=noise) as child:
        patience = Patience(child.pid, limit_s=IMPORT_TIMEOUT_S, wall_s=WALL_S)
        for line in _lines(child, patience):
            message = json.loads(line)
            if "begin" in message:
                running, case = message["begin"], "loading"
                begun = time.monotonic()
                limit_s, wall_s = limits[len(proofs)]
                patience.restart(limit_s=limit_s, wall_s=wall_s)
                say(f"proving {running}")
            elif "again" in message:
                limit_s, wall_s = limits[len(proofs)]
                patience.restart(limit_s=limit_s, wall_s=wall_s)
            elif "case" in message:
                case = message["case"]
            else:
                proofs.append(proof_from_json(message["proof"]))
        if len(proofs) == len(candidates):
            return proofs
        # A kernel may close what it is heard through, and go on.
        while child.poll() is None and not patience.spent():
            time.sleep(LOOK_EVERY_S)
        late = child.poll() is None
        if late:
            os.killpg(child.pid, signal.SIGKILL)
        status = child.wait()
        reason = (
            Reason(code="timeout", text=f"{case}: {patience.sentence()}")
            if late
            else _death(status, case=case, noise=noise)
        )
    seconds = time.monotonic() - begun
    return [*proofs, Proof(backend=running, reasons=(reason,), seconds=seconds)]


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


def _lines(child: subprocess.Popen[bytes], patience: Patience) -> Iterator[bytes]:
    """Yield whole lines until the child ends, closes its side, or patience does."""
    pending = b""
    assert child.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not patience.spent():
            if not selector.select(timeout=LOOK_EVERY_S):
                # What a kernel started and left behind may hold the pipe open.
                if child.poll() is not None:
                    return
                continue
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from lines


def _death(status: int, *, case: str, noise: IO[bytes]) -> Reason:
    """Say what a child died of."""
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

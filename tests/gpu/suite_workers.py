"""Run units of work in worker processes, so that a kernel that hangs or crashes ends its unit only.

A worker (suite_units.py) reads one unit per line and answers with lines: {"stage": ...} while it
runs, then {"outcome": {...}}. It serves many units, since importing torch takes longer than most of
them; one that dies, hangs or reports a broken CUDA context is replaced before the next unit.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("suite_units.py")
# A unit is not started with less time than this.
SHORTEST_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work with one record.

    Attributes:
        step: the step that it belongs to.
        kind: the function of suite_units.py that runs it.
        backend: the attention backend; "" for none.
        what: the rest of its name, "bfloat16 head_dim 64".
        limit_s: its time limit, in seconds.
        values: the arguments of the function.
    """

    step: str
    kind: str
    backend: str = ""
    what: str = ""
    limit_s: float = 60.0
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name in its record."""
        return " ".join(part for part in (self.step, self.backend, self.what) if part)


class Pool:
    """Workers that are reused from one call of run() to the next.

    Args:
        environment: of the workers.
        script: what a worker runs.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        *,
        script: Path = SCRIPT,
    ) -> None:
        self.environment, self.script = environment, script
        self.workers: dict[int, _Worker] = {}

    def run(
        self,
        units: Sequence[Unit],
        *,
        workers: int,
        deadline: float,
        record: Callable[[Unit, float, Mapping[str, Any]], None],
    ) -> None:
        """Run units until all are done or the deadline is near.

        Args:
            units: what to run, the most valuable first.
            workers: processes side by side.
            deadline: time.monotonic() at which the last unit must have ended.
            record: called with each unit, the time.monotonic() of its beginning and its outcome.
        """
        waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
        for unit in units:
            waiting.put(unit)

        def serve(place: int) -> None:
            while deadline - time.monotonic() > SHORTEST_S:
                try:
                    unit = waiting.get_nowait()
                except queue.Empty:
                    return
                if place not in self.workers:
                    self.workers[place] = _Worker(self.script, self.environment)
                begun = time.monotonic()
                outcome = self.workers[place].run(unit, until=min(begun + unit.limit_s, deadline))
                if outcome.pop("replace", False):
                    self.workers.pop(place).end()
                record(unit, begun, outcome)

        places = range(min(workers, len(units)))
        threads = [threading.Thread(target=serve, args=(n,), daemon=True) for n in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def restart(self) -> None:
        """End all workers; the next unit starts new ones, which can import new kernels."""
        for place in list(self.workers):
            self.workers.pop(place).end()


class _Worker:
    """A process that runs units; it is killed together with its child processes."""

    def __init__(self, script: Path, environment: Mapping[str, str]) -> None:
        self.noise = tempfile.TemporaryFile()  # noqa: SIM115 - closed by end()
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.noise,
            env=dict(environment),
            start_new_session=True,
        )
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):  # end() closes it
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put(b"")

    def run(self, unit: Unit, *, until: float) -> dict[str, Any]:
        """Run one unit; a worker that is lost is an outcome, with `replace` set."""
        begun, stage = time.monotonic(), "starting"
        task = {"kind": unit.kind, "backend": unit.backend, "limit_s": until - begun}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a worker that died is met below
            self.process.stdin.write(json.dumps({**task, **unit.values}).encode() + b"\n")
            self.process.stdin.flush()
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                text = f"{stage}: still running after {time.monotonic() - begun:.0f} s"
                return {"state": "timeout", "code": "timeout", "text": text, "replace": True}
            if not line:
                text = f"{stage}: {self._death()}"
                return {"state": "crash", "code": "crash", "text": text, "replace": True}
            message = json.loads(line)
            if "outcome" in message:
                return dict(message["outcome"])
            stage = message["stage"]

    def _death(self) -> str:
        """Describe how the process ended, with the last line that it wrote to stderr."""
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        self.noise.seek(0)
        lines = self.noise.read().decode(errors="replace").strip().splitlines()
        return f"the process ended with {how}" + (f": {lines[-1][:300]}" if lines else "")

    def end(self) -> None:
        """Kill the process and its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.noise):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

"""Run everything that needs a GPU, the most valuable first, within a budget of seconds.

    python -m pip install --no-index --no-deps --target build/site build/gpu-kit/wheels/*.whl
    PYTHONPATH=build/site python tests/gpu/suite.py --out FILE.jsonl [--budget 540] [--steps a,b]

Each unit of work runs in a worker process with its own time limit (suite_workers.py,
suite_units.py), and its record is on the disk before the next one begins, so that a run that is cut
off keeps its records. compile_kernels.py compiles the kernels of the kit in the background; each
joins the steps when it is ready. A second run reads the proofs of the first with `--known
FILE.jsonl`, and uses its wheels if they were saved with `--keep FOLDER` and copied into the kit.
`--rehearsal` runs the same code on a CPU, with smaller sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import suite_adapters as adapters  # noqa: E402 - needs the path above
from suite_steps import STEPS, Progress, Sizes, pending  # noqa: E402
from suite_units import gpu_facts, versions  # noqa: E402
from suite_workers import SHORTEST_S, Pool, Unit  # noqa: E402

# Units that run before the scheduler looks for kernels that have become ready.
CHUNK = 6
COMPILER = Path(__file__).with_name("compile_kernels.py")


class Records:
    """The JSON Lines file of a run: each record is on the disk before add() returns."""

    def __init__(self, path: Path, *, machine: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("x", encoding="utf-8")
        self.machine, self.begun = machine, time.monotonic()
        self.lock = threading.Lock()
        self.made: list[dict[str, Any]] = []

    def add(self, kind: str, step: str, *, seconds: float, **rest: Any) -> None:
        """Write one record and print it in a line."""
        started = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
        record = {
            "kind": kind,
            "step": step,
            "backend": rest.pop("backend", ""),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(seconds, 2),
            "machine": self.machine,
            **rest,
        }
        with self.lock:
            self.made.append(record)
            try:
                self.file.write(json.dumps(record) + "\n")
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as error:  # a full disk: the log has the record
                print(f"not written ({error.strerror}): {json.dumps(record)}", flush=True)
            self._print(record)

    def _print(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "plan":
            return
        at = time.monotonic() - self.begun
        name = record.get("unit") or f"{record['step']} {record['backend']}"
        code, text = str(record.get("code") or ""), str(record.get("text") or "")
        message = text if text.startswith(code) else f"{code} {text}"
        values = record.get("values") or {}
        keys = ("tokens_per_second", "both_tflops", "share_of_peak", "difference", "refused")
        figures = ", ".join(f"{key} {values[key]}" for key in keys if values.get(key) is not None)
        print(
            f"{at:6.1f} s  {record['state']:<11} {name}  ({record['seconds']:.1f} s)"
            + (f"  {figures}" if figures else "")
            + (f"  {message[:240]}" if message else ""),
            flush=True,
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file; text after the last line break is incomplete."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


class Kernels:
    """The kernels of the kit, compiled in the background into a folder for PYTHONPATH."""

    def __init__(
        self, kit: Path, folder: Path, *, keep: Path | None, script: Path = COMPILER
    ) -> None:
        self.folder = folder
        self.status = folder / "status.jsonl"
        self.read = len(read_lines(self.status))  # a folder of an earlier run has its states
        self.begun = time.monotonic()
        self.process: subprocess.Popen[bytes] | None = None
        self.missing = ""
        if not script.exists() or not kit.is_dir():
            self.missing = f"no kernels are installed: found no {kit.name}; see make gpu-kit"
            return
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(script), "--kit", str(kit), "--to", str(folder)]
        command += ["--keep", str(keep)] if keep else []
        with (folder / "compile.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *adapters.kernel_backends().values()],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def new_states(self) -> list[dict[str, Any]]:
        """Return the states of kernels that were written since the last call."""
        lines = read_lines(self.status)
        fresh, self.read = lines[self.read :], len(lines)
        return fresh

    def busy(self) -> bool:
        """Return whether more kernels may become ready."""
        return self.process is not None and self.process.poll() is None

    def end(self) -> None:
        """Stop compiling."""
        if self.process is not None and self.busy():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def main() -> None:
    """Run the steps."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the compilers too
    now = time.monotonic()
    deadline = now + options.budget
    machine = adapters.this_machine()
    installed = versions()
    key = json.dumps([machine.gpu, machine.driver, installed], sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    records = Records(options.out, machine=digest)
    records.add(
        "run", "start", seconds=0.0, state="measured",
        values={
            "gpu": machine.gpu, "arch": machine.arch.name, "driver": machine.driver,
            "versions": installed, "smi": gpu_facts(), "rehearsal": options.rehearsal,
            "budget": options.budget, "steps": options.steps,
            "known": options.known.stem if options.known else None,
        },
    )  # fmt: skip
    kernels = Kernels(options.kit, options.kernels, keep=options.keep)
    if kernels.missing:
        records.add("kernel", "kernels", seconds=0.0, state="not here", text=kernels.missing)
    try:
        _run(options, records, kernels, deadline=deadline)
    finally:
        kernels.end()
    done = sum(1 for record in records.made if record["state"] in ("passed", "measured"))
    spent = time.monotonic() - now
    records.add(
        "run", "end", seconds=spent, state="measured",
        values={
            "records": len(records.made), "passed or measured": done, "smi": gpu_facts(),
        },
    )  # fmt: skip


def _run(
    options: argparse.Namespace, records: Records, kernels: Kernels, *, deadline: float
) -> None:
    """Run the first step that has pending units, until none has or the time is up."""
    sizes = Sizes.rehearsal() if options.rehearsal else Sizes.gpu()
    progress = Progress(
        native=adapters.native_backends(),
        kernels=adapters.kernel_backends(),
        records=records.made,
        in_config={name for name in adapters.packing() if adapters.backend(name).in_config},
        packing=adapters.packing(),
        known=read_lines(options.known) if options.known else (),
    )
    pool = Pool(_environment(kernels.folder))
    left = {step: STEPS[step] * sizes.time_factor for step in options.steps}
    planned: set[str] = set()

    def units_of(step: str, *, waiting: bool) -> list[Unit]:
        """Return the pending units of a step; an error here ends this step only."""
        try:
            return pending(step, progress, sizes, waiting=waiting)
        # Records of a GPU may differ from those of the tests.
        except Exception as error:
            left.pop(step)
            text = f"{type(error).__name__}: {error}"
            records.add("step", step, seconds=0.0, unit=f"{step}: its units", state="crash",
                        code="scheduling", text=text)  # fmt: skip
            return []

    while deadline - time.monotonic() > SHORTEST_S:
        # Read first: a kernel that becomes ready later is handled in the next round.
        busy = kernels.busy()
        states = kernels.new_states()
        if any(state["state"] == "installed" for state in states):
            pool.restart()  # transformers looks for packages once, when it is imported
        for state in states:
            _record_kernel(records, state)
        for step, seconds in list(left.items()):
            units = units_of(step, waiting=busy)
            if units and seconds > SHORTEST_S:
                break
        else:
            if not busy:
                break
            time.sleep(0.5)
            continue
        if new := [unit.name for unit in units if unit.name not in planned]:
            records.add("plan", step, seconds=0.0, state="measured", values={"units": new})
            planned |= set(new)
        if busy and step != "proofs":
            units = units[:CHUNK]
        begun = time.monotonic()
        pool.run(
            units,
            workers=sizes.workers if step in ("proofs", "kernels", "repeats", "slow") else 1,
            deadline=min(deadline, begun + seconds),
            record=lambda unit, at, outcome: _record(records, unit, at, outcome),
        )
        left[step] = seconds - max(1.0, time.monotonic() - begun)
    pool.restart()
    for state in kernels.new_states():
        _record_kernel(records, state)
    made = {record.get("unit") for record in records.made}
    for step in list(left):
        for unit in units_of(step, waiting=False):
            if unit.name not in made:
                records.add(
                    unit.kind, unit.step, seconds=0.0, backend=unit.backend, unit=unit.name,
                    state="not reached", code="budget", text="the time was up before it began",
                )  # fmt: skip


def _record(records: Records, unit: Unit, begun: float, outcome: Mapping[str, Any]) -> None:
    seconds = time.monotonic() - begun
    records.add(
        unit.kind, unit.step, seconds=seconds, backend=unit.backend, unit=unit.name, **outcome
    )


def _record_kernel(records: Records, state: Mapping[str, Any]) -> None:
    """Record a final state of a kernel from compile_kernels.py."""
    named = {"installed": "passed", "failed": "failed"}
    if state["state"] in named:
        records.add(
            "kernel", "kernels", seconds=float(state.get("seconds") or 0.0),
            backend=state["kernel"].lower().replace("_", "-"), state=named[state["state"]],
            text=str(state.get("error") or "")[:900], values={"state": state["state"]},
        )  # fmt: skip


def _environment(kernels: Path) -> dict[str, str]:
    """Return the environment of workers: this checkout and the kernels can be imported."""
    path = [str(ROOT), str(kernels), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(part for part in path if part),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True, help="the new JSON Lines file")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds in total")
    parser.add_argument(
        "--kit", type=Path, default=ROOT / "build/gpu-kit", help="from make gpu-kit"
    )
    parser.add_argument("--kernels", type=Path, help="where kernels are installed")
    parser.add_argument("--known", type=Path, help="records of an earlier run, for its proofs")
    parser.add_argument("--keep", type=Path, help="folder for compiled wheels")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--rehearsal", action="store_true", help="small sizes, for a CPU")
    options = parser.parse_args()
    if unknown := [step for step in options.steps if step not in STEPS]:
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(STEPS)}")
    if options.out.exists():
        parser.error(f"{options.out} exists: one file is one run")
    options.kernels = options.kernels or Path(tempfile.mkdtemp(prefix="attnimg-kernels-"))
    return options


if __name__ == "__main__":
    main()

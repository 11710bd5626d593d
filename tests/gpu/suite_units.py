"""The worker of suite.py: run the units that it reads from stdin; see suite_workers.py.

Each function takes a unit's values and returns an outcome: `state` ("passed", "failed", "measured",
"not here"), `values`, and `code` and `text` for details. The exception of a kernel is an outcome
too.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

# Repeated proofs that share a process; results are recorded after each batch.
BATCH = 5
Outcome = dict[str, Any]
Stage = Callable[[str], None]

PACKAGES = (
    "attnimg", "torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets",
    "kernels", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl",
    "sageattention", "xformers", "torchao", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
)  # fmt: skip
_SMI = (
    "name,driver_version,memory.total,clocks.max.sm,clocks.sm,clocks.max.mem,clocks.mem,"
    "power.limit,temperature.gpu,compute_cap"
)


def versions() -> dict[str, str]:
    """Return the installed versions of the packages on which a result may depend."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def gpu_facts() -> dict[str, str]:
    """Return the values of nvidia-smi for the first GPU; empty without one."""
    command = ["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    first = done.stdout.splitlines()[0]
    return dict(zip(_SMI.split(","), (part.strip() for part in first.split(",")), strict=True))


def facts(_unit: dict[str, Any], stage: Stage) -> Outcome:
    """Record the machine: GPU, driver, clocks, CUDA, torch's build."""
    stage("importing torch")
    import torch

    values: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions(),
        "gpu": gpu_facts(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        values |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "capability": list(torch.cuda.get_device_capability(0)),
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"state": "measured", "values": values}


def doctor(unit: dict[str, Any], _stage: Stage) -> Outcome:
    """Run `attnimg doctor --json`, and return its report."""
    done = _command([sys.executable, "-m", "attnimg", "doctor", "--json"], unit)
    found = json.loads(done.stdout)
    bad = [check["what"] for check in found["checks"] if check["status"] not in ("ok", "warn")]
    return {
        "state": "passed" if found["ok"] else "failed",
        "code": "" if found["ok"] else "doctor",
        "text": "; ".join(bad),
        "values": found,
    }


def proof(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Prove a backend as `attnimg verify` and train do, without the cache, once or repeatedly."""
    import suite_adapters as adapters

    machine, problem = adapters.this_machine(), adapters.problem(unit)
    if against := adapters.reasons_against(unit["backend"], machine, problem):
        return _not_here(against)
    if lacking := adapters.lacking_in_small_build(unit["backend"], unit, machine):
        return _not_here([("small-build", lacking)])
    stage("proving")
    until = time.monotonic() + unit["limit_s"]
    made, taken = [], 0.0
    while len(made) < unit["repeats"] and (left := until - time.monotonic()) > 1.3 * taken:
        # The time limit does not include the imports of the child process.
        timeout_s = max(10.0, left - 15)
        if unit["repeats"] == 1:
            made.append(adapters.prove_once(unit["backend"], machine, problem, timeout_s=timeout_s))
        else:
            times = min(BATCH, unit["repeats"] - len(made))
            made += adapters.prove_repeatedly(
                unit["backend"], machine, problem, times=times, timeout_s=timeout_s
            )
        taken = left - (until - time.monotonic())
    refused = [one for one in made if not one.passed]
    reported = refused[0] if refused else made[0]
    worst = [
        {"quantity": f.quantity, "error": _number(f.error), "allowed": _number(f.allowed)}
        for f in reported.figures
    ]
    return {
        "state": "failed" if refused else "passed",
        "code": reported.reasons[0].code if refused else "",
        "text": "; ".join(f"{reason.code}: {reason.text}" for reason in reported.reasons),
        "values": {
            "dtype": unit["dtype"],
            "head_dims": unit["head_dims"],
            "packing": unit["packing"],
            "sequence_len": unit["sequence_len"],
            "proofs": len(made),
            "refused": len(refused),
            "refusals": [[reason.text for reason in one.reasons] for one in refused],
            "probes": reported.cases,
            "proof_seconds": [round(one.seconds, 2) for one in made],
            "figures": worst,
            "notes": [note for note in (reported.note, adapters.note_of(reported.backend)) if note],
            "versions": versions(),
        },
    }


def train_command(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Run `attnimg train` on a random model written to the disk."""
    missing = [name for name in ("trl", "datasets", "peft") if name not in versions()]
    if missing:
        return _not_here([("not-installed", f"needs {', '.join(missing)}")])
    import suite_models

    with tempfile.TemporaryDirectory() as folder:
        stage("writing the model")
        config = suite_models.write_job(Path(folder), unit)
        stage("attnimg train")
        begun = time.monotonic()
        done = _command([sys.executable, "-m", "attnimg", "train", str(config)], unit)
        seconds = time.monotonic() - begun
        lines_out = done.stderr.strip().splitlines()
        if done.returncode != 0:
            text = " | ".join(line.strip() for line in lines_out[-8:])
            return {"state": "failed", "code": f"exit-{done.returncode}", "text": text[-900:]}
        lines = (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()
        logs = [log for log in map(json.loads, lines) if "tokens_per_second" in log]
    speeds = sorted(log["tokens_per_second"] for log in logs[1:] or logs)
    return {
        "state": "passed",
        "values": {
            "tokens_per_second": speeds[len(speeds) // 2],
            "memory_bytes": max(log["memory_bytes"] for log in logs),
            "losses": [log["loss"] for log in logs],
            "command_seconds": round(seconds, 1),
            "proof": [line.strip() for line in lines_out if "proof:" in line or "packing:" in line],
            **{name: unit[name] for name in ("shape", "sequence_len", "rows", "steps")},
            "versions": versions(),
        },
    }


def tests(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Run the tests of every backend's call and training with pytest; proofs are steps here."""
    stage("pytest")
    file = "tests/gpu/test_backends.py"
    command = [sys.executable, "-m", "pytest", file, "-q", "-rf", "--maxfail=5"]
    # Versions other than the locked ones have other warnings.
    done = _command([*command, "-W", "default", "-o", "filterwarnings=default"], unit, cwd=ROOT)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""]
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    }
    failed = [line[:300] for line in lines if line.startswith("FAILED")]
    return {
        "state": "passed" if done.returncode == 0 else "failed",
        "code": "" if done.returncode == 0 else f"exit-{done.returncode}",
        "text": "; ".join(failed) if failed or not done.returncode else lines[-1][:300],
        "values": {"counts": counts},
    }


def training(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Train a random model for some steps; see suite_models.py."""
    import suite_models

    return suite_models.training(unit, stage)


def timing(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Time a backend's attention; see suite_timing.py."""
    import suite_timing

    return suite_timing.timing(unit, stage)


def layers(unit: dict[str, Any], stage: Stage) -> Outcome:
    """Prove Liger's layers of a model, or an optimizer; see suite_layers.py."""
    import suite_layers

    return suite_layers.layers(unit, stage)


KINDS = {
    "facts": facts, "doctor": doctor, "proof": proof, "training": training, "timing": timing,
    "train-command": train_command, "tests": tests, "layers": layers,
}  # fmt: skip


def _command(
    command: list[str], unit: dict[str, Any], *, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    limit = max(1.0, unit["limit_s"] - 2)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=limit,
        cwd=cwd,
    )


def _not_here(reasons: list[tuple[str, str]]) -> Outcome:
    """Return the outcome of a unit that can't run on this machine."""
    text = "; ".join(f"{code}: {text}" for code, text in reasons)
    return {"state": "not here", "code": reasons[0][0], "text": text}


def _number(value: float) -> float | None:
    """Return a number for JSON, which has no NaN and no infinity."""
    return value if abs(value) < float("inf") else None


def _outcome_of_exception(error: BaseException, *, stage: str) -> Outcome:
    """Return the outcome of an exception; with a broken CUDA context, the worker is replaced."""
    from attnimg.errors import without_middle

    text = without_middle(" ".join(str(error).split()))
    kind = type(error).__name__
    code = "out-of-memory" if "out of memory" in text.lower() else getattr(error, "code", kind)
    if isinstance(error, subprocess.TimeoutExpired):
        # Its output so far; bytes even in text mode.
        output = (error.stdout or b"")[-400:].decode(errors="replace")
        return {"state": "timeout", "code": "timeout", "text": f"{stage}: {text}: {output}"}
    broken = "CUDA error" in text or kind == "AcceleratorError"
    return {
        "state": "failed",
        "code": str(code),
        "text": f"{stage}: {kind}: {text}",
        "replace": broken,
    }


def _free_memory(outcome: Outcome) -> Outcome:
    """Free the GPU's memory for other processes; if that fails, have the worker replaced."""
    torch = sys.modules.get("torch")
    if torch is None or outcome.get("replace") or not torch.cuda.is_initialized():
        return {}
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:  # of an asynchronous error before
        return {"replace": True}
    return {}


def _exit_with_parent(parent: int) -> None:
    """Kill this process and its child processes when its parent has exited.

    PR_SET_PDEATHSIG does not help: it acts when the thread that started the process ends, and these
    threads end before the worker does.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Serve units until stdin ends."""
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of kernels must not mix with the answers
    for line in sys.stdin:
        unit = json.loads(line)
        stages = ["starting"]

        def stage(text: str, stages: list[str] = stages) -> None:
            stages[0] = text
            answers.write(json.dumps({"stage": text}) + "\n")

        importlib.invalidate_caches()  # kernels are installed in the background
        try:
            outcome = KINDS[unit["kind"]](unit, stage)
        # Foreign kernels may raise any exception, on import and in a call.
        except (Exception, SystemExit) as error:
            outcome = _outcome_of_exception(error, stage=stages[0])
        answers.write(json.dumps({"outcome": {**outcome, **_free_memory(outcome)}}) + "\n")


if __name__ == "__main__":
    main()

"""Measure the time of hashing in saving a checkpoint and in resuming from it.

Trains all weights of models: a checkpoint has the weights and twice their size of the optimizer. It
saves checkpoints in turn with hashes, and by the same code with a constant for each hash; the last
ones as attnimg 0.1.0 did: pickled, without hashes, and finished before training continues. Resuming
is timed in new processes, from their start to the first step; the files are in the page cache.
The folder is in memory (tmpfs): a disk delays some writes by several times what hashing takes.
Writes docs/measured/checkpoints.json, and exits with 1 where a share is above TARGET. It needs two
idle cores and 12 GB of memory: a thread hashes while another trains.

    python benchmarks/checkpoints.py
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/checkpoints.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/fixtures")]

# Linux's file system in memory.
IN_MEMORY = Path("/dev/shm")

# Limit on the share that hashing adds to the time for which a save stops training, and on the share
# of the check in resuming. Source: issue 12, item 2.
TARGET = 0.10
KINDS = ("hashed", "plain", "earlier")
# A save may depend on the one before, so each of these kinds follows every kind.
COMPARED = ("hashed", "plain", "plain", "hashed")
EARLIER = ("earlier",) * 3
STEPS_BETWEEN = 5
RESUMES = 2
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 1,
              "vocab_size": 4096, "rounds": 16},
    "medium": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
               "vocab_size": 8192, "rounds": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8,
              "vocab_size": 8192, "rounds": 3},
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    f"{size}, {cores} {'cores' if cores > 1 else 'core'}": values | {"cores": cores}
    for size, values in SIZES.items()
    for cores in (2, 1)
}
KEYS: dict[str, Any] = {
    "sequence_len": 32,
    "micro_batch_size": 1,
    "save_total_limit": 2,
    "save_steps": STEPS_BETWEEN,
    "learning_rate": 1e-4,
}


def main() -> int:
    """Measure, write the record, and exit with 1 where a share is above TARGET."""
    import torch

    saves, resumes = {}, {}
    for name in RUNS:
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            saves[name] = call_in_process(f"measure_saves({folder!r}, {name!r})")
            resumes[name] = [
                call_in_process(f"measure_resume({folder!r}, {name!r})") for _ in range(RESUMES)
            ]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}",
        **settings(),
        "saves": saves,
        "resumes": resumes,
    }
    record["medians"] = medians(record)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["medians"], indent=1))
    shares = [run[share] for run in record["medians"].values() for share in SHARES]
    return int(max(shares) > TARGET)


def settings() -> dict[str, Any]:
    """Return the settings of the measurement, for the test that the record is up to date."""
    return {"runs": RUNS, "keys": KEYS, "steps": STEPS_BETWEEN, "target": TARGET}


# The shares that TARGET limits.
SHARES = ("more_blocked", "check_of_resume")


def medians(record: dict[str, Any]) -> dict[str, Any]:
    """Return medians and shares.

    Returns:
        For each run, the seconds of each kind of save: blocked, for which training waits; finished,
        until the checkpoint is complete; cycle, of the save and the steps until the next one; cpu,
        of the process in this time.
        more_blocked: how much longer training waits than without hashes, as a share.
        more_cycle, more_cpu: how much longer these are, in seconds.
        resume, check: seconds from a process's start to its first step, and of the check in it.
        check_of_resume: their share.
    """
    found = {}
    for name, run in record["saves"].items():
        seconds: dict[str, Any] = {
            kind: {what: _median(run[kind], what)
                   for what in ("blocked", "finished", "cycle", "cpu")}
            for kind in KINDS
        }  # fmt: skip
        hashed, plain = seconds["hashed"], seconds["plain"]
        whole, check = (_median(record["resumes"][name], what) for what in ("seconds", "check"))
        found[name] = seconds | {
            "more_blocked": round(hashed["blocked"] / plain["blocked"] - 1, 3),
            **{f"more_{what}": round(hashed[what] - plain[what], 3) for what in ("cycle", "cpu")},
            "resume": whole,
            "check": check,
            "check_of_resume": round(check / whole, 3),
        }
    return found


def _median(measured: list[dict[str, float]], what: str) -> float:
    return round(statistics.median(entry[what] for entry in measured), 3)


def call_in_process(call: str) -> Any:
    """Call a function of this file in a new process; return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.checkpoints import *; {call}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def write_model(folder: Path, run: dict[str, Any]) -> None:
    """Write a Llama of random weights with a tokenizer."""
    from tiny_run import make_tokenizer  # type: ignore[import-not-found]  # of tests/fixtures
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    sizes = {key: run[key] for key in run.keys() - {"cores", "rounds"}}
    config = LlamaConfig(**sizes, num_attention_heads=8, max_position_embeddings=256)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure_saves(place: str, name: str) -> None:
    """Train and save; print the seconds of each kind of save, and the size of a checkpoint.

    One more save with hashes is last: the resumes start from it.
    """
    import torch
    from tiny_run import run

    from attnimg.train.checkpoint import PendingCheckpoint
    from attnimg.train.engine import Engine

    folder = Path(place)
    use_cores(RUNS[name]["cores"])
    torch.set_num_threads(1)
    write_model(folder / "model", RUNS[name])
    order = save_order(name)
    found: dict[str, Any] = {kind: [] for kind in KINDS}
    current = {"blocked": 0.0, "finished": 0.0, "cycle": 0.0, "cpu": 0.0}
    patches = ExitStack()
    began, cpu, current_kind = 0.0, 0.0, ""
    save, begin = Engine._save_checkpoint, PendingCheckpoint.start

    def blocking(function: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            current["blocked"] += time.perf_counter() - start

        return timed

    def timed_begin(self: PendingCheckpoint, finish: Callable[[], None]) -> None:
        def timed() -> None:
            finish()
            current["finished"] = time.perf_counter() - began

        # 0.1.0 finished a checkpoint before it trained on.
        timed() if current_kind == "earlier" else begin(self, timed)

    def timed_save(engine: Engine, *arguments: Any) -> None:
        nonlocal began, cpu, current_kind
        number = engine.state.global_step // STEPS_BETWEEN - 1
        blocking(engine.finish_checkpoint)()
        if number:
            current["cycle"] = time.perf_counter() - began
            current["cpu"] = time.process_time() - cpu
            found[current_kind].append({what: round(took, 4) for what, took in current.items()})
        patches.close()
        current_kind = [*order, "hashed"][number]
        for patch in patches_for(current_kind):
            patches.enter_context(patch)
        touch_memory(3 * sum(weight.nbytes for weight in engine.model.parameters()))
        current["blocked"], began, cpu = 0.0, time.perf_counter(), time.process_time()
        blocking(save)(engine, *arguments)

    with (
        mock.patch.object(Engine, "_save_checkpoint", timed_save),
        mock.patch.object(PendingCheckpoint, "start", timed_begin),
    ):
        run(folder, folder / "out", max_steps=(len(order) + 1) * STEPS_BETWEEN, **KEYS)
    newest = folder / "out" / f"checkpoint-{(len(order) + 1) * STEPS_BETWEEN}"
    found["mb"] = round(sum(path.stat().st_size for path in newest.iterdir()) / 1e6)
    print(json.dumps(found))


def use_cores(cores: int) -> None:
    """Run this process on some of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def touch_memory(size: int) -> None:
    """Write to memory and free it, so that the next save finds it ready to use.

    A hypervisor takes back memory that a guest has freed. By chance, a save writes to such memory,
    and takes three times as long.
    """
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE):
        pass


def save_order(name: str) -> list[str]:
    """Return the kind of each save of a run."""
    return [*COMPARED * RUNS[name]["rounds"], *EARLIER]


def patches_for(kind: str) -> list[Any]:
    """Return the patches for a kind of save."""
    from transformers import Trainer

    from attnimg.train import checkpoint
    from attnimg.train.engine import Engine

    no_hash = mock.patch.object(checkpoint, "_hash_file", return_value="0" * 64)
    pickled = mock.patch.multiple(
        Engine, save_optimizer=lambda *_: None,
        _save_optimizer_and_scheduler=Trainer._save_optimizer_and_scheduler,
    )  # fmt: skip
    in_turn = mock.patch.object(checkpoint, "write_manifest", flush_in_turn)
    found: dict[str, list[Any]] = {
        "hashed": [], "plain": [no_hash], "earlier": [pickled, in_turn],
    }  # fmt: skip
    return found[kind]


def flush_in_turn(folder: Path, *_: object, **__: object) -> None:
    """Flush the files of a checkpoint as before there were manifests."""
    from attnimg.train.checkpoint import flush

    for path in folder.rglob("*"):
        flush(path)


def measure_resume(folder: str, name: str) -> None:
    """Resume from the newest checkpoint of a folder, and print the seconds up to the first step."""
    import psutil
    from tiny_run import run

    from attnimg.train import check, intact
    from attnimg.train.engine import RunCallback

    use_cores(RUNS[name]["cores"])
    started, seconds = psutil.Process().create_time(), dict[str, float]()
    begin = RunCallback.on_train_begin

    def timed(found: list[Path]) -> Any:
        began = time.perf_counter()
        newest = intact.find_newest_intact(found)
        seconds["check"] = round(time.perf_counter() - began, 3)
        return newest

    def reached(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        seconds["seconds"] = round(time.time() - started, 3)
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    keys = {**KEYS, "max_steps": 1000, "save_steps": 100, "resume_from_checkpoint": True}
    with (
        mock.patch.object(check, "find_newest_intact", timed),
        mock.patch.object(RunCallback, "on_train_begin", reached),
    ):
        run(Path(folder), Path(folder) / "out", **keys)


if __name__ == "__main__":
    sys.exit(main())

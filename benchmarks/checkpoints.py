"""Measure the time of hashing in saving a checkpoint and in resuming from it.

Trains a model of 33 million weights in full, so a checkpoint has 400 MB. Checkpoints are saved in
three ways, in all orders: with hashes; by the same code with a constant in place of each hash; and
as before there were manifests, pickled and without hashes. Resuming is timed in new processes, from
their start to the first step; the files are in the page cache. Writes
docs/measured/checkpoints.json, and exits with 1 where a share is above TARGET. It needs two idle
cores: a thread hashes while another writes.

    python benchmarks/checkpoints.py
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/checkpoints.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests/fixtures")]

# What hashing may add to a save, and the share of the check in resuming.
# Source: issue 12, item 2.
TARGET = 0.10
KINDS = ("hashed", "plain", "earlier")
# The kind of each save. The disk's state depends on the save before, so each kind follows each.
ORDER = [kind for kinds in itertools.permutations(KINDS) for kind in kinds] * 3
RESUMES = 3
MODEL: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
    "num_attention_heads": 8, "vocab_size": 8192, "max_position_embeddings": 256,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "sequence_len": 32,
    "micro_batch_size": 1,
    "save_total_limit": 2,
    "learning_rate": 1e-4,
}


def main() -> int:
    """Measure, write the record, and exit with 1 where a share is above TARGET."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as made:
        folder = Path(made)
        write_model(folder / "model")
        saves = timed_saves(folder)
        size = sum(
            path.stat().st_size
            for path in (folder / "out" / f"checkpoint-{len(ORDER) + 1}").iterdir()
        )
        resumes = [timed_resume(folder) for _ in range(RESUMES)]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, torch {torch.__version__}",
        **described(),
        "checkpoint_mb": round(size / 1e6),
        "saves": saves,
        "resumes": resumes,
    }
    record |= summary(record)
    print(json.dumps(record, indent=1))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(max(record["extra_of_hashing"], record["share_of_resume"]) > TARGET)


def described() -> dict[str, Any]:
    """Return the settings of the measurement, for the test that the record is up to date."""
    return {"model": MODEL, "run": KEYS, "target": TARGET}


def summary(record: dict[str, Any]) -> dict[str, float]:
    """Return medians of what was measured, and shares.

    Returns:
        seconds_of_save: of each kind; extra_of_hashing: what a save takes more than the same one
        without hashes, as a share; extra_to_earlier: the same, compared with the earlier one;
        share_of_resume: of the check.
    """
    saves = {kind: statistics.median(record["saves"][kind]) for kind in KINDS}
    whole, check = (
        statistics.median(resume[name] for resume in record["resumes"])
        for name in ("seconds", "check")
    )
    return {
        **{f"seconds_of_save_{kind}": round(saves[kind], 2) for kind in KINDS},
        "extra_of_hashing": round(saves["hashed"] / saves["plain"] - 1, 3),
        "extra_to_earlier": round(saves["hashed"] / saves["earlier"] - 1, 3),
        "seconds_of_resume": round(whole, 2),
        "seconds_of_check": round(check, 2),
        "share_of_resume": round(check / whole, 3),
    }


def write_model(folder: Path) -> None:
    """Write a Llama of random weights with a tokenizer."""
    from tiny_run import make_tokenizer  # type: ignore[import-not-found]  # of tests/fixtures
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(folder)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(folder)


def timed_saves(folder: Path) -> dict[str, list[float]]:
    """Train and save after each step; return the seconds of each kind of save.

    One save more comes last, with hashes: the resumes start from it.
    """
    from tiny_run import run
    from transformers import Trainer

    from attnimg.train import checkpoint, file_hashes
    from attnimg.train.engine import Engine

    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    save = Engine._save_checkpoint
    no_hash = mock.patch.multiple(file_hashes, **{
        name: mock.Mock(return_value="0" * 64) for name in ("_hash", "_hash_of")
    })  # fmt: skip
    pickled = mock.patch.multiple(
        Engine, save_optimizer=lambda *_: None,
        _save_optimizer_and_scheduler=Trainer._save_optimizer_and_scheduler,
    )  # fmt: skip
    in_turn = mock.patch.object(checkpoint, "write_manifest", flush_in_turn)
    changes: dict[str, list[Any]] = {
        "hashed": [],
        "plain": [no_hash],
        "earlier": [pickled, in_turn],
    }

    def timed(engine: Engine, *arguments: Any) -> None:
        if engine.state.global_step > len(ORDER):
            save(engine, *arguments)
            return
        kind = ORDER[engine.state.global_step - 1]
        with ExitStack() as changed:
            for change in changes[kind]:
                changed.enter_context(change)
            began = time.perf_counter()
            save(engine, *arguments)
            found[kind].append(round(time.perf_counter() - began, 3))

    with mock.patch.object(Engine, "_save_checkpoint", timed):
        run(folder, folder / "out", max_steps=len(ORDER) + 1, save_steps=1, **KEYS)
    return found


def flush_in_turn(folder: Path, *_: object, **__: object) -> None:
    """Flush the files of a checkpoint as before there were manifests."""
    from attnimg.train.file_hashes import flush

    for path in folder.rglob("*"):
        flush(path)


def timed_resume(folder: Path) -> dict[str, float]:
    """Resume in a new process; return its seconds until the first step, and those of the check."""
    code = f"from benchmarks.checkpoints import resume; resume({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def resume(folder: str) -> None:
    """Resume from the newest checkpoint of a folder, and print the seconds up to the first step."""
    import psutil
    from tiny_run import run

    from attnimg.train import intact, output_dir, watch

    started, seconds = psutil.Process().create_time(), dict[str, float]()
    begin = watch.Watch.on_train_begin

    def timed(found: list[Path]) -> Any:
        began = time.perf_counter()
        newest = intact.newest_whole(found)
        seconds["check"] = round(time.perf_counter() - began, 3)
        return newest

    def reached(*arguments: Any, **options: Any) -> None:
        begin(*arguments, **options)
        seconds["seconds"] = round(time.time() - started, 3)
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    keys = {**KEYS, "max_steps": len(ORDER) + 3, "save_steps": 100, "resume_from_checkpoint": True}
    with (
        mock.patch.object(output_dir, "newest_whole", timed),
        mock.patch.object(watch.Watch, "on_train_begin", reached),
    ):
        run(Path(folder), Path(folder) / "out", **keys)


if __name__ == "__main__":
    sys.exit(main())

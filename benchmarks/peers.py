"""Compare attnimg with a TRL script and with axolotl: the same model, data, packing and steps.

    python benchmarks/peers.py [--rounds 3]

In each round, each trainer runs in a process of its own; figures are medians. The first run of
attnimg also proves its backend, and later runs read the proof from the cache. TRL runs in attnimg's
environment, axolotl in build/axolotl, with the versions that it needs. Writes
docs/measured/peers.json, and the table of docs/peers.md. Exits with 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/peers.json"
PAGE = ROOT / "docs/peers.md"
BEGIN, END = "<!-- table: make bench/peers -->", "<!-- end of table -->"
AXOLOTL = ROOT / "build/axolotl/bin/python"

STEPS = 30
# The first steps warm caches up, and are not in the steady state.
WARM = 5
SEQUENCE, ROWS = 512, 2
# At most this share of axolotl's CPU time to the first step, and at least this share of the best
# throughput. Source: issue 16, item 4.
FIRST_STEP_MAX, THROUGHPUT_MIN = 0.5, 1.0
# Rows are packed differently, so that each trainer sees other documents in its steps.
LOSS_NOISE = 0.1
TRAINERS = ("attnimg, first run", "attnimg", "TRL", "axolotl")

# What all runs share, in transformers' names.
SHARED: dict[str, Any] = {
    "per_device_train_batch_size": ROWS, "max_steps": STEPS, "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 5, "weight_decay": 0.0,
    "optim": "adamw_torch_fused", "seed": 42, "bf16": False, "fp16": False,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none",
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "base_model": "model", "datasets": [{"path": "data.jsonl", "type": "completion"}],
    "sequence_len": SEQUENCE, "sample_packing": True, "micro_batch_size": ROWS,
    "gradient_accumulation_steps": 1, "max_steps": STEPS, "learning_rate": 2e-3,
    "lr_scheduler": "cosine", "warmup_steps": 5, "weight_decay": 0.0,
    "optimizer": "adamw_torch_fused", "seed": 42, "bf16": False, "fp16": False, "tf32": False,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no",
    "attn_implementation": "sdpa", "output_dir": "out", "val_set_size": 0,
}  # fmt: skip

# Runs in the trainer's process: notes the CPU time after the steps NOTED, and how many tokens the
# model's embedding saw in each step.
MEASURE = """
import json, os, resource, sys
import psutil, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
def cpu():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(u.ru_utime + u.ru_stime for u in used)
    # RUSAGE_CHILDREN has only processes that have ended: not the worker of a data loader.
    for child in psutil.Process().children(recursive=True):
        total += sum(child.cpu_times()[:4])
    return total
seen, steps = [0], []
embed = torch.nn.Embedding.forward
def counted(self, ids):
    seen[0] += int((ids != self.padding_idx).sum()) if self.padding_idx is not None else ids.numel()
    return embed(self, ids)
torch.nn.Embedding.forward = counted
def note(*_):
    steps.append((cpu() if len(steps) + 1 in NOTED else None, seen[0]))
    seen[0] = 0
register_optimizer_step_post_hook(note)
def finish():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with open(os.environ["PEERS_FIGURES"], "w") as file:
        json.dump({"steps": steps, "total_cpu_s": cpu(), "peak_mb": peak}, file)
"""
RUN_ATTNIMG = (
    MEASURE
    + """
from attnimg.__main__ import run
code = run(["train", "config.yaml"])
finish()
sys.exit(code)
"""
)
RUN_AXOLOTL = (
    MEASURE
    + """
from axolotl.cli.train import do_cli
do_cli(config="config.yaml")
finish()
"""
)
RUN_TRL = (
    MEASURE
    + """
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer
arguments = SFTConfig(output_dir="out", max_length=SEQUENCE, packing=True, use_cpu=True, **SHARED)
data = load_dataset("json", data_files="data.jsonl", split="train")
trainer = SFTTrainer("model", args=arguments, train_dataset=data)
trainer.train()
trainer.save_model("out")
finish()
"""
)
# The mean loss of a trained model over all documents, the same for each trainer.
EVALUATE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("model")
total = count = 0
with torch.no_grad():
    for line in open("data.jsonl"):
        ids = tokenizer(json.loads(line)["text"])["input_ids"][:SEQUENCE - 1]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
print("LOSS", total / count)
"""


def settings() -> dict[str, Any]:
    """Return what is measured; a test compares it with the record's."""
    return {"steps": STEPS, "warm_steps": WARM, "sequence_len": SEQUENCE,
            "micro_batch_size": ROWS, "optimizer": CONFIG["optimizer"], "attention": "sdpa",
            "precision": "float32"}  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return the medians of a trainer's runs."""

    def median(name: str, digits: int) -> float:
        values: list[float] = [run[name] for run in runs if name in run]
        return round(statistics.median(values), digits)

    return {
        "first_step_cpu_s": median("first_step_cpu_s", 2),
        "tokens_per_cpu_s": median("tokens_per_cpu_s", 0),
        "tokens_a_step": median("tokens_a_step", 0),
        "peak_mb": median("peak_mb", 0),
        "final_loss": median("final_loss", 3),
    }


def misses(record: dict[str, Any]) -> list[str]:
    """Return the targets that a record misses."""
    of = record["trainers"]
    found = []
    share = of["attnimg"]["first_step_cpu_s"] / of["axolotl"]["first_step_cpu_s"]
    if share > FIRST_STEP_MAX:
        found.append(
            f"first step: {share:.2f} of axolotl's CPU time, needed at most {FIRST_STEP_MAX}"
        )
    best = max(of[name]["tokens_per_cpu_s"] for name in TRAINERS)
    share = of["attnimg"]["tokens_per_cpu_s"] / best
    if share < THROUGHPUT_MIN:
        found.append(f"throughput: {share:.2f} of the best, needed at least {THROUGHPUT_MIN}")
    losses = [of[name]["final_loss"] for name in TRAINERS]
    if max(losses) - min(losses) > LOSS_NOISE:
        found.append(
            f"final loss: {min(losses)} to {max(losses)}, needed at most {LOSS_NOISE} apart"
        )
    return found


def table(record: dict[str, Any]) -> str:
    """Return the generated part of docs/peers.md."""
    rows = ["| | CPU to the first step | tokens per CPU second | tokens per step | peak memory "
            "| final loss |", "|---|---|---|---|---|---|"]  # fmt: skip
    for name in TRAINERS:
        found = record["trainers"][name]
        rows.append(
            f"| {name} | {found['first_step_cpu_s']:.1f} s | {found['tokens_per_cpu_s']:,.0f} | "
            f"{found['tokens_a_step']:,.0f} | {found['peak_mb']:,.0f} MB | "
            f"{found['final_loss']:.2f} |"
        )
    versions = "; ".join(f"{name}: {text}" for name, text in record["versions"].items())
    missed = misses(record)
    targets = "All targets are met." if not missed else f"Targets missed: {'; '.join(missed)}."
    return "\n".join(
        (
            *rows,
            "",
            f"{record['date']}, {record['machine']}, load average {record['load_average']}. "
            f"{targets}",
            "",
            f"Versions: {versions}.",
        )
    )


def page(text: str, record: dict[str, Any]) -> str:
    """Return docs/peers.md with the table of a record."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table(record)}\n{END}{rest.partition(END)[2]}"


def prepare(folder: Path) -> None:
    """Write the demo's model, and the dictionary as plain text."""
    demo = ROOT / "examples/demo/prepare.py"
    subprocess.run([sys.executable, str(demo), str(folder)], check=True)
    (folder / "untrained").rename(folder / "model")
    source = ROOT / "examples/data/devils_dictionary.jsonl"
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for line in source.read_text(encoding="utf-8").splitlines():
            found = json.loads(line)
            file.write(json.dumps({"text": f"{found['instruction']}\n{found['output']}"}) + "\n")


def run_once(name: str, folder: Path, kept: Path, *, evaluate: bool) -> dict[str, Any]:
    """Train once in a new folder; return the figures of the run, with the loss if requested."""
    place = Path(tempfile.mkdtemp(dir=folder))
    for item in ("model", "data.jsonl"):
        (place / item).symlink_to(folder / item)
    cache = place / "cache" if name == "attnimg, first run" else kept
    config = CONFIG | {"dataset_prepared_path": "prepared"}
    (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    python = str(AXOLOTL) if name == "axolotl" else sys.executable
    script = {"axolotl": RUN_AXOLOTL, "TRL": RUN_TRL}.get(name, RUN_ATTNIMG)
    for word, value in (("SEQUENCE", SEQUENCE), ("SHARED", SHARED), ("NOTED", (1, WARM, STEPS))):
        script = script.replace(word, repr(value))
    figures = place / "figures.json"
    environment = os.environ | {
        "ATTNIMG_CACHE": str(cache), "PEERS_FIGURES": str(figures), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(place / "datasets"),
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "AXOLOTL_DO_NOT_TRACK": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    with (place / "log").open("w") as log:
        done = subprocess.run(
            [python, "-c", script], cwd=place, env=environment, stdout=log, stderr=log, check=False
        )
    if done.returncode or not figures.exists():
        sys.exit(f"{name} failed:\n{(place / 'log').read_text()[-3000:]}")
    found = json.loads(figures.read_text())
    steps = found["steps"]
    if len(steps) != STEPS:
        sys.exit(f"{name} made {len(steps)} optimizer steps, needed {STEPS}")
    steady = steps[WARM:]
    tokens = sum(count for _, count in steady)
    loss = {}
    if evaluate:
        evaluated = subprocess.run(
            [sys.executable, "-c", EVALUATE.replace("SEQUENCE", str(SEQUENCE)), "out"],
            cwd=place, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        loss["final_loss"] = round(float(re.findall(r"LOSS (\S+)", evaluated.stdout)[0]), 4)
    shutil.rmtree(place)
    return {
        "first_step_cpu_s": round(steps[0][0], 2),
        "tokens_per_cpu_s": round(tokens / (steps[-1][0] - steps[WARM - 1][0])),
        "tokens_a_step": round(tokens / len(steady)),
        "peak_mb": round(found["peak_mb"]),
        **loss,
    }


def versions(python: str, names: tuple[str, ...]) -> str:
    """Return the versions of packages in an environment."""
    code = "import sys; from importlib.metadata import version\n"
    code += "print(', '.join(f'{n} {version(n)}' for n in sys.argv[1:]))"
    done = subprocess.run(
        [python, "-c", code, *names], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def write(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Write the record and the table of the rounds so far, and return the record."""
    stack = ("torch", "transformers", "trl", "accelerate", "datasets")
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores of a shared {platform.machine()} machine without a GPU",
        # Other processes take caches and clock rate, and so more CPU time, on a busy machine.
        "load_average": round(os.getloadavg()[2], 1),
        "versions": {
            "attnimg and TRL": versions(sys.executable, stack),
            "axolotl": versions(str(AXOLOTL), ("axolotl", *stack)),
        },
        "rounds": len(runs[TRAINERS[-1]]),
        **settings(),
        "trainers": {name: summary(found) for name, found in runs.items()},
        "runs": runs,
    }
    RECORD.write_text(f"{json.dumps(record, indent=2)}\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")
    return record


def main() -> int:
    """Measure all trainers; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Compare attnimg with TRL and axolotl.")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer, at least 1")
    rounds = max(1, parser.parse_args().rounds)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in TRAINERS}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        kept = folder / "kept"
        for name in ("axolotl", "attnimg"):  # the bytecode of all packages, and the proof
            run_once(name, folder, kept, evaluate=False)
        for number in range(1, rounds + 1):
            for name in TRAINERS:
                found = run_once(name, folder, kept, evaluate=number == 1)
                runs[name].append(found)
                sys.stderr.write(f"round {number} of {rounds}: {name}: {json.dumps(found)}\n")
            record = write(runs)
    print(table(record))
    return 1 if misses(record) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare the forecast of memory with the peaks of real runs of `attnimg train` on the CPU.

Each run trains a random model in a process of its own. Its peak is the process's largest resident
memory (VmHWM in /proc), over loading, checks, three steps and saving. In the last step, torch's
profiler counts what torch allocates: that is the part which a GPU would hold. Half of the runs
calibrate the constants in attnimg/memory, the other half validates them.
Writes docs/measured/memory.json after each run.

    python benchmarks/memory.py [NAME ...]
    python benchmarks/memory.py --tables
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs/measured/memory.json"
sys.path[:0] = [str(ROOT), str(ROOT / "examples/demo")]

STEPS = 3
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4,
    "intermediate_size": 512, "moe_intermediate_size": 256, "num_experts": 16,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
FULL: dict[str, Any] = {
    "sequence_len": 512, "micro_batch_size": 2, "learning_rate": 1e-4, "bf16": False,
    "sample_packing": True, "pad_to_sequence_len": True, "optimizer": "adamw_torch_fused",
}  # fmt: skip
LORA: dict[str, Any] = FULL | {"adapter": "lora", "lora_r": 16, "lora_target_linear": True}

TINY: dict[str, Any] = LLAMA | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128,
                                "num_hidden_layers": 1, "num_attention_heads": 2,
                                "num_key_value_heads": 1}  # fmt: skip

WIDER: dict[str, Any] = LLAMA | {"hidden_size": 640, "intermediate_size": 2048,
                                 "num_hidden_layers": 7}  # fmt: skip

# name -> part, fields of the model's config.json, keys of the run. The runs of the part "base" have
# nearly no tensors: they measure the process.
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tiny full": ("base", TINY, FULL | {"sequence_len": 64, "micro_batch_size": 1}),
    "tiny lora": ("base", TINY, LORA | {"sequence_len": 64, "micro_batch_size": 1}),
    "full fp32": ("calibrate", LLAMA, FULL),
    "full fp32, checkpointing": (
        "validate", LLAMA, FULL | {"micro_batch_size": 8, "gradient_checkpointing": True}),
    "full bf16": ("calibrate", LLAMA, FULL | {"bf16": True, "micro_batch_size": 4}),
    "tied, large vocabulary": (
        "validate", LLAMA | {"vocab_size": 65536, "num_hidden_layers": 2, "hidden_size": 384,
                              "tie_word_embeddings": True}, FULL | {"micro_batch_size": 1}),
    "untied, large vocabulary, bf16": (
        "validate", LLAMA | {"vocab_size": 32768, "num_hidden_layers": 3},
        FULL | {"bf16": True, "micro_batch_size": 2}),
    "long rows, checkpointing": (
        "calibrate", LLAMA | {"max_position_embeddings": 4096, "num_hidden_layers": 4},
        FULL | {"sequence_len": 4096, "micro_batch_size": 1, "gradient_checkpointing": True,
                "sample_packing": False}),
    "eager attention": (
        "validate", LLAMA | {"num_hidden_layers": 4},
        FULL | {"attn_implementation": "eager", "sequence_len": 1024, "micro_batch_size": 1}),
    "mixture of experts": ("calibrate", MOE, FULL | {"micro_batch_size": 4}),
    "lora fp32": ("calibrate", LLAMA, LORA | {"micro_batch_size": 3}),
    "lora bf16": ("validate", LLAMA, LORA | {"bf16": True, "micro_batch_size": 4}),
    "lora bf16, checkpointing": (
        "calibrate", LLAMA | {"hidden_size": 1024, "intermediate_size": 3072},
        LORA | {"bf16": True, "gradient_checkpointing": True, "micro_batch_size": 2}),
    "qlora": (
        "calibrate", LLAMA | {"hidden_size": 1024, "intermediate_size": 2816},
        LORA | {"adapter": "qlora", "bf16": True, "micro_batch_size": 1}),
    "qlora, checkpointing": (
        "validate", LLAMA | {"hidden_size": 1024, "intermediate_size": 2816},
        LORA | {"adapter": "qlora", "micro_batch_size": 1, "gradient_checkpointing": True}),
    "adafactor": (
        "calibrate", LLAMA | {"hidden_size": 768, "intermediate_size": 2304},
        FULL | {"optimizer": "adafactor", "micro_batch_size": 1}),
    "8-bit optimizer": (
        "calibrate", LLAMA | {"hidden_size": 768, "intermediate_size": 2304},
        FULL | {"optimizer": "adamw_8bit", "micro_batch_size": 1}),
    "sgd, accumulation": (
        "validate", LLAMA | {"hidden_size": 768, "intermediate_size": 2304},
        FULL | {"optimizer": "sgd", "micro_batch_size": 1, "gradient_accumulation_steps": 2}),
    "adafactor, bf16": (
        "validate", WIDER, FULL | {"optimizer": "adafactor", "bf16": True, "sequence_len": 1024,
                                   "micro_batch_size": 1}),
    "adafactor, bf16, checkpointing": (
        "calibrate", WIDER,
        FULL | {"optimizer": "adafactor", "bf16": True, "sequence_len": 2048, "micro_batch_size": 2,
                "gradient_checkpointing": True}),
    "long rows, bf16": (
        "validate", WIDER | {"max_position_embeddings": 4096},
        FULL | {"bf16": True, "sequence_len": 2048, "micro_batch_size": 1}),
    "lora bf16, long rows": (
        "validate", WIDER, LORA | {"bf16": True, "sequence_len": 2048, "micro_batch_size": 1}),
    "qwen2, evaluation": (
        "calibrate", LLAMA | {"model_type": "qwen2"},
        FULL | {"val_set_size": 0.1, "eval_steps": 2, "eval_batch_size": 6}),
}  # fmt: skip


def main(names: list[str]) -> None:
    """Measure the named runs, or all, and write the record after each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    record = json.loads(RECORD.read_text("utf-8")) if names and RECORD.is_file() else {"runs": {}}
    record |= {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()} CPU, Python "
        f"{platform.python_version()}, torch {version('torch')}",
    }
    names = names or list(RUNS)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        written = _worker("write", folder, *names)
        if written.returncode:
            sys.exit(written.stderr)
        for name in names:
            part, model, keys = RUNS[name]
            done = _worker("train", folder, name)
            result = Path(folder) / name / "result.json"
            if done.returncode or not result.is_file():
                print(f"{name}: {done.stderr[-3000:]}", file=sys.stderr)
                continue
            measured = json.loads(result.read_text("utf-8"))
            record["runs"][name] = {"part": part, "model": model, "keys": keys, **measured}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(measured), flush=True)
            shutil.rmtree(Path(folder) / name)


def forecast_run(model: dict[str, Any], keys: dict[str, Any], *, head: str) -> dict[str, Any]:
    """Return the forecast of a run on a CPU: bytes of the process and of what torch allocates.

    Args:
        model: fields of the model's config.json.
        keys: of the run.
        head: "own" where the run kept its logits, "chunked" where it used TRL's head.
    """
    from attnimg.facts import Arch, Machine
    from attnimg.memory.architecture import read_architecture
    from attnimg.memory.forecast import forecast_memory
    from attnimg.memory.settings import SMALL_LOGITS

    machine = Machine(arch=Arch(name="cpu", vendor="cpu"), gpu="cpu")
    values = {key: value for key, value in keys.items() if value is not None}
    if "eval_steps" not in values:
        values["eval_strategy"] = "no"
    config, problem, plan = choose_backend(model, values, machine)
    sizes = read_architecture(model, problem.model)
    options = {
        "plan": plan,
        "machine": machine,
        "small_logits": SMALL_LOGITS if head == "own" else 0,
    }
    found = forecast_memory(config, sizes, problem=problem, **options)
    # Evaluations and the comparison of the loss are not in the profiled step.
    no_evaluation = config.model_copy(update={"eval_strategy": "no", "eval_batch_size": None})
    problem = replace(problem, rows=config.micro_batch_size)
    step = forecast_memory(no_evaluation, sizes, problem=problem, **options)
    return {"peak": found.total, "tensors": step.step_tensors, "why": found.why}


def choose_backend(model: dict[str, Any], keys: dict[str, Any], machine: Any) -> Any:
    """Return the config of a run, what its attention computes, and the chosen plan."""
    from attnimg.config.schema import Config
    from attnimg.task import build_task

    base = {"base_model": "model", "datasets": [{"path": "data.jsonl", "type": "completion"}]}
    config = Config.model_validate(base | {"learning_rate": 1e-4} | keys)
    task = build_task(config, model, machine)
    return config, task.problem, task.choose()


# The H200's runs in docs/gpu-runs: a Llama of 16 layers, trained by a plain loop with AdamW and
# transformers' own loss on 4,096 packed tokens. The inner kernels of sdpa that they ran are linear
# in the row length, except sdpa_math, which is not compared.
GPU_MODEL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
GPU_KEYS: dict[str, Any] = {
    "bf16": "full", "sequence_len": 4096, "sample_packing": True, "optimizer": "adamw_torch",
}  # fmt: skip
GPU_BACKENDS = {"varlen_attn": "varlen_attn", "sdpa_efficient": "varlen_attn",
                "flash_attention_3": "varlen_attn", "eager": "eager"}  # fmt: skip
# transformers' loss has the logits in bfloat16 and float32, their log-softmax and its gradient.
GPU_LOGIT_BYTES = 2 + 4 + 4 + 4


def gpu_comparisons() -> list[dict[str, Any]]:
    """Return backend, measured and forecast bytes of the GPU runs with a model of this size."""
    from attnimg.facts import Arch, Machine
    from attnimg.memory.amounts import Amount
    from attnimg.memory.architecture import Architecture, read_architecture
    from attnimg.memory.forecast import largest_phase, list_phases
    from attnimg.memory.parts import weight_bytes
    from attnimg.memory.settings import RunSettings, read_settings
    from attnimg.selection.run_findings import quadratic_memory

    arch = Arch(name="sm_90", vendor="nvidia", capability=(9, 0))
    machine = Machine(arch=arch, gpu="NVIDIA H200")
    found = []
    for path in sorted((ROOT / "docs/gpu-runs").glob("*.jsonl")):
        for line in map(json.loads, path.read_text("utf-8").splitlines()):
            values = line.get("values") or {}
            backend = line.get("backend")
            if line.get("kind") != "training" or backend not in GPU_BACKENDS:
                continue
            if values.get("shape") != "1b" or not values.get("memory_bytes"):
                continue
            keys = GPU_KEYS | {"attn_implementation": GPU_BACKENDS[backend]}
            _, problem, plan = config_and_plan = choose_backend(GPU_MODEL, keys, machine)
            model = read_architecture(GPU_MODEL, problem.model)
            assert isinstance(model, Architecture)
            run = read_settings(
                config_and_plan[0], problem, machine, plan.chosen.backend,
                vocabulary=model.vocabulary,
            )  # fmt: skip
            assert isinstance(run, RunSettings)
            quadratic = quadratic_memory(plan, problem)
            phases = list_phases(model, run, quadratic=quadratic.layer if quadratic else 0)
            logits = values["tokens_per_step"] * model.vocabulary
            phases["loss"]["loss"] = Amount(logits * GPU_LOGIT_BYTES)
            parts = phases[largest_phase(phases)].values()
            tensors = weight_bytes(model, run) + sum(part.total for part in parts)
            found.append({"run": path.stem, "backend": backend, "measured": values["memory_bytes"],
                          "forecast": tensors})  # fmt: skip
    return found


def compare(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return measured and forecast bytes of each run, and the relative errors of the forecasts."""
    found = []
    for name, run in record["runs"].items():
        forecast = forecast_run(run["model"], run["keys"], head=run.get("head", "chunked"))
        measured = {"peak": run["peak"], "tensors": run["device"]["peak"]}
        errors = {key: forecast[key] / measured[key] - 1 for key in measured}
        found.append({"name": name, "part": run["part"], "measured": measured,
                      "forecast": forecast, "errors": errors})  # fmt: skip
    return found


def summarize(record: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return part of the runs -> what is compared -> number, mean and largest absolute error."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for part in ("calibrate", "validate"):
        rows = [row for row in compare(record) if row["part"] == part]
        found[part] = {}
        for key in ("peak", "tensors"):
            errors = [abs(row["errors"][key]) for row in rows]
            found[part][key] = {"runs": len(errors), "mean": sum(errors) / len(errors),
                                "largest": max(errors)}  # fmt: skip
    return found


def table(record: dict[str, Any]) -> list[str]:
    """Return the rows of the table in docs/will-it-fit.md."""
    rows = []
    for row in compare(record):
        cells = [row["name"], row["part"]]
        for key in ("peak", "tensors"):
            cells += [f"{row[side][key] / 2**20:,.0f}" for side in ("measured", "forecast")]
            cells.append(f"{row['errors'][key]:+.1%}")
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def summary_rows(record: dict[str, Any]) -> list[str]:
    """Return the rows of the table of errors in docs/will-it-fit.md."""
    names = {"calibrate": "calibrate the constants", "validate": "validate them"}
    rows = []
    for part, found in summarize(record).items():
        cells = [names[part], str(found["peak"]["runs"])]
        for key in ("peak", "tensors"):
            cells += [f"{found[key][what]:.1%}" for what in ("mean", "largest")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def gpu_rows() -> list[str]:
    """Return the rows of the table of GPU runs in docs/will-it-fit.md."""
    return [
        f"| {row['backend']} | {row['run']} | {row['measured'] / 2**30:.2f} | "
        f"{row['forecast'] / 2**30:.2f} | {row['forecast'] / row['measured'] - 1:+.1%} |"
        for row in gpu_comparisons()
    ]


def _worker(task: str, folder: str, *names: str) -> Any:
    command = [sys.executable, __file__, f"--{task}", folder, *names]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)


def write_inputs(folder: Path, name: str) -> None:
    """Write the model, the data and the config of a run."""
    import torch
    import yaml
    from transformers import AutoConfig, AutoModelForCausalLM

    _, fields, keys = RUNS[name]
    prepare: Any = import_module("prepare")
    tokenizer = prepare.make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields)
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config.update(ids | {"bos_token_id": None})
    dtype = torch.bfloat16 if keys["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.update(**ids, bos_token_id=None)
    model.save_pretrained(folder / "model")
    draw = random.Random(0)
    words = [f"w{number}" for number in range(500)]
    rows = keys["micro_batch_size"] * keys.get("gradient_accumulation_steps", 1) * (STEPS + 8)
    length = keys["sequence_len"]
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(rows * (4 if keys["sample_packing"] else 1)):
            count = draw.randint(length // 8, length // 4) if keys["sample_packing"] else length
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=count))}) + "\n")
    run = {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / "data.jsonl"), "type": "completion"}],
        "excess_length_strategy": "truncate",
        "max_steps": STEPS,
        "output_dir": str(folder / "out"),
        **({} if "save_steps" in keys else {"save_strategy": "no"}),
        **({} if "eval_steps" in keys else {"eval_strategy": "no"}),
        **{key: value for key, value in keys.items() if value is not None},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")


def train(folder: Path, name: str) -> None:
    """Run `attnimg train` in this process; write its peaks to result.json."""
    import torch

    from attnimg.cli.train import train as train_command

    fit: Any = import_module("attnimg.train.fit")
    model: Any = import_module("attnimg.train.model")
    engine: Any = import_module("attnimg.train.engine").Engine

    found: dict[str, Any] = {"peaks": {}}
    steps = STEPS * RUNS[name][2].get("gradient_accumulation_steps", 1)
    accumulation = steps // STEPS
    calls = 0
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    load, step, end = model.load_model, engine.training_step, engine._maybe_log_save_evaluate
    check = fit._check_own_loss

    def measured_load(*arguments: Any, **options: Any) -> Any:
        found["base"] = read_status("VmRSS")
        found["peaks"]["start"] = take_peak()
        loaded = load(*arguments, **options)
        found["loaded"] = read_status("VmRSS")
        found["peaks"]["load"] = take_peak()
        return loaded

    def measured_check(*arguments: Any) -> Any:
        found["peaks"]["isolation"] = take_peak()
        result = check(*arguments)
        found["peaks"]["loss check"] = take_peak()
        return result

    def measured_step(self: Any, model: Any, inputs: Any, *others: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == steps - accumulation + 1:
            found["peaks"]["steps"] = take_peak()
            found["device"] = {"start": live_bytes(self, inputs)}
            found["backend"] = self.session.run.backend
            found["head"] = "own" if self.own_head else "chunked"
            found["tokens"] = list(inputs["input_ids"].shape)
            profiler.start()
        return step(self, model, inputs, *others)

    def measured_end(self: Any, *arguments: Any, **options: Any) -> Any:
        if calls == steps and "peak" not in found["device"]:
            profiler.stop()
            found["device"]["peak"] = found["device"]["start"] + profiled_peak(profiler)
        return end(self, *arguments, **options)

    model.load_model = measured_load
    fit._check_own_loss = measured_check
    engine.training_step, engine._maybe_log_save_evaluate = measured_step, measured_end
    train_command(str(folder / "run.yaml"), [])
    # The peaks end before the profiled step, in which the process also has the profiler's events.
    # Saving is not measured: safetensors writes tensors without a copy.
    found["peak"] = max(found["peaks"].values())
    (folder / "result.json").write_text(json.dumps(found), encoding="utf-8")


def read_status(name: str) -> int:
    """Return a size in /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def take_peak() -> int:
    """Return the largest resident memory since the last call.

    Source: proc(5), /proc/pid/clear_refs, "5": resets the peak (Linux man-pages, 2026-11-27).
    """
    peak = read_status("VmHWM")
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return peak


def live_bytes(engine: Any, inputs: Any) -> int:
    """Return the bytes of weights, optimizer states, gradients and batch, each storage once."""
    import torch

    states = engine.optimizer.state.values() if engine.optimizer else ()
    tensors = [
        *engine.model.parameters(),
        *engine.model.buffers(),
        *(weight.grad for weight in engine.model.parameters()),
        *(value for state in states for value in state.values()),
        *inputs.values(),
    ]
    for module in engine.model.modules():  # scales of bitsandbytes
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset]
            tensors += [state.state2.absmax, state.state2.code] if state.nested else []
        for holder in (getattr(module, "state", None), getattr(module, "weight", None)):
            tensors += [getattr(holder, "CB", None), getattr(holder, "SCB", None)]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def profiled_peak(profiler: Any) -> int:
    """Return the largest sum of allocations minus frees that a profiler recorded."""
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    total = peak = 0
    for _, size in sorted(changes):
        total += size
        peak = max(peak, total)
    return peak


if __name__ == "__main__":
    if sys.argv[1:2] in (["--write"], ["--train"]):
        task = write_inputs if sys.argv[1] == "--write" else train
        for name in sys.argv[3:]:
            task(Path(sys.argv[2]) / name, name)
    elif sys.argv[1:] == ["--tables"]:
        kept = json.loads(RECORD.read_text("utf-8"))
        print("\n".join([*summary_rows(kept), "", *table(kept), "", *gpu_rows()]))
    else:
        main(sys.argv[1:])

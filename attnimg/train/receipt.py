"""Write receipt.json: what a run used, on which machine, why this attention, and how it ended."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from attnimg.config.schema import Config
from attnimg.facts import Backend, Machine, Plan, Proof, RunContext
from attnimg.train.checkpoint import replace_text, writing

FILE = "receipt.json"

PACKAGES = (
    "attnimg", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "kernels",
    "tokenizers", "deepspeed", "triton", "bitsandbytes", "safetensors", "numpy", "flash-attn",
    "flash-attn-3", "flash-attn-4", "xformers", "sageattention", "torchao",
)  # fmt: skip

Status = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The results of the steps before training.

    Attributes:
        machine: the machine of the run.
        plan: the selected attention, with all reasons.
        implementation: its name in transformers, "sdpa" or "kernels-community/flash-attn2".
        context: how the model is called, as it was proven.
        isolation: figures of the packing proof; None without packing.
        proofs: proofs of the attention kernels, failed ones included.
        kernels: backend -> hashes of the files that compute it, by their kind, such as "torch";
            None where some are unknown.
    """

    machine: Machine
    plan: Plan
    implementation: str
    context: RunContext
    isolation: Mapping[str, object] | None = None
    proofs: tuple[Proof, ...] = ()
    kernels: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Return the name of the backend."""
        return self.plan.chosen.backend.name if self.plan.chosen else self.implementation


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How the run ended.

    Attributes:
        steps: optimizer steps done, those of earlier sessions included.
        loss: loss of the last logged window of steps; None when no step was left to train.
        eval_loss: loss of the last evaluation, per trained token; None without one.
        aux_loss: the auxiliary loss of a mixture of experts in that window, without its weight;
            None where the model computes none.
        tokens: tokens trained on without padding, earlier sessions included.
        seconds: wall time of this session.
        files: the written files, the most important first.
        resumed_from: the checkpoint that it resumed from.
        notes: notes for the user, such as on an early stop.
    """

    steps: int
    loss: float | None
    eval_loss: float | None
    aux_loss: float | None
    tokens: int
    seconds: float
    files: tuple[Path, ...]
    resumed_from: Path | None
    notes: tuple[str, ...] = ()


def open_receipt(
    config: Config, *, run: RunFacts, figures: Mapping[str, object], resumed_from: Path | None
) -> dict[str, object]:
    """Return the content of a receipt before the first step.

    Args:
        config: the validated run.
        run: machine, plan, precision, packing proof.
        figures: statistics of the data, the packing and the schedule, by name.
        resumed_from: the checkpoint that the run resumes from.
    """
    return {
        "status": "running",
        "started": now(),
        "ended": None,
        "resumed_from": resumed_from,
        "config": config.model_dump(exclude_none=True),
        "versions": versions(),
        "hardware": run.machine,
        "plan": run.plan,
        "attention": {"backend": run.backend, "implementation": run.implementation},
        "dtype": run.context.dtype,
        "context": run.context,
        "applied": None,
        "isolation": run.isolation,
        "proofs": run.proofs,
        **figures,
        "metrics": {},
        "files": [],
        "error": None,
    }


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that decide what a run computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_receipt(folder: Path, receipt: Mapping[str, object], *, status: Status) -> Path:
    """Write the receipt atomically: after a kill, the file is the last complete one.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    ended = None if status == "running" else now()
    path = folder / FILE
    with writing(path, kept="the checkpoints are kept"):
        text = json.dumps(plain({**receipt, "status": status, "ended": ended}), indent=2)
        replace_text(path, text + "\n")
    return path


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def plain(value: object) -> object:
    """Return values as JSON types: a backend by its name, NaN and paths as strings."""
    if isinstance(value, Backend):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def settings_in_use(engine: Any, plan: Plan) -> dict[str, object]:
    """Return the settings that a trainer uses, when it is ready for its next step.

    Args:
        engine: the engine, after it restored the checkpoint, if there is one.
        plan: for the backends that a router calls.
    """
    optimizer, scheduler = engine.optimizer, engine.lr_scheduler
    arguments, accelerator = engine.args, engine.accelerator
    return {
        "step": engine.state.global_step,
        "max_steps": engine.state.max_steps,
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__,
        "groups": [
            {"tensors": len(group["params"])}
            | {name: _number(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "scheduler": {
            "class": type(scheduler).__name__,
            "last_epoch": getattr(scheduler, "last_epoch", None),
            "base_lrs": [_number(rate) for rate in getattr(scheduler, "base_lrs", ())],
        },
        "max_grad_norm": arguments.max_grad_norm,
        "micro_batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "seed": arguments.seed,
        "dtypes": {
            "trained": _dtypes(engine.model, trained=True),
            "frozen": _dtypes(engine.model, trained=False),
        },
        "attention": {
            "modules": _attention(engine.model),
            "backends": [
                {"layers": choice.layers, "backend": choice.verdict.backend.name}
                for choice in plan.groups
            ],
        },
    }


def _number(value: Any) -> Any:
    """Return a value as a number; torchao's optimizers keep their learning rate in a tensor."""
    return value.item() if hasattr(value, "item") else value


def _dtypes(model: Any, *, trained: bool) -> dict[str, int]:
    """Return how many weights have each dtype, of the trained or of the frozen ones."""
    found: Counter[str] = Counter()
    for weight in model.parameters():
        if weight.requires_grad is trained:
            found[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    return dict(found)


def _attention(model: Any) -> list[dict[str, object]]:
    """Return each kind of attention module with the implementation that it calls, and its count."""
    found: Counter[tuple[str, int | None, str]] = Counter()
    for module in model.modules():
        name = type(module).__name__
        called = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if "Attention" in name and called is not None:
            found[name, getattr(module, "sliding_window", None), str(called)] += 1
    return [
        {"class": name, "window": window, "implementation": called, "count": count}
        for (name, window, called), count in found.items()
    ]


def count_weights(model: Any) -> dict[str, int]:
    """Return the number of trained weights and of all, without the frozen copies of PEFT's modules.

    Tied weights count once, packed 4-bit ones by their unpacked number.
    """
    counts = {"trained": 0, "all": 0}
    for name, weight in model.named_parameters():
        if ".original_module." not in name:  # of modules_to_save
            counts["all"] += _numel(weight)
            counts["trained"] += _numel(weight) * weight.requires_grad
    return counts


def _numel(weight: Any) -> int:
    """Return the number of a weight's elements, of a sharded or packed one as well."""
    # DeepSpeed's ZeRO 3 leaves an empty tensor in place of a weight.
    count = int(weight.numel() or getattr(weight, "ds_numel", 0))
    if type(weight).__name__ == "Params4bit":
        return count * 2 * int(weight.element_size())
    return count


def weights_sentence(counts: Mapping[str, int]) -> str:
    """Return the line on the weights that a run prints before its first step."""
    trained, total = counts["trained"], counts["all"]
    return f"weights: trains {trained:,} of {total:,} ({trained / max(total, 1):.2%})"

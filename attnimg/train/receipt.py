"""receipt.json: what ran, where, why this attention, and how it ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from attnimg.config.schema import Config
from attnimg.train.disk import replace_text, writing
from attnimg.train.run_facts import RunFacts

FILE = "receipt.json"
PACKAGES = (
    "attnimg", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "kernels",
    "bitsandbytes", "safetensors", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4",
    "xformers", "sageattention", "torchao",
)  # fmt: skip

Status = Literal["running", "done", "stopped", "failed"]


def now() -> str:
    """Tell the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def open_receipt(
    config: Config, *, run: RunFacts, figures: Mapping[str, object], resumed_from: Path | None
) -> dict[str, object]:
    """Write down what is known before the first step.

    Args:
        config: the validated run.
        run: machine, plan, precision, packing proof.
        figures: of the data, the packing and the schedule, by name.
        resumed_from: the checkpoint the run goes on from.
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
    """Name the installed packages that decide what a run computes."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_receipt(folder: Path, receipt: Mapping[str, object], *, status: Status) -> Path:
    """Write the receipt in one piece; a killed run leaves the last one that was whole.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    ended = None if status == "running" else now()
    path = folder / FILE
    with writing(path, kept="the checkpoints are kept"):
        text = json.dumps(plain({**receipt, "status": status, "ended": ended}), indent=2)
        replace_text(path, text + "\n")
    return path


def plain(value: object) -> object:
    """Turn facts into what JSON holds: dataclasses, mappings, sets, paths; nan becomes a string."""
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

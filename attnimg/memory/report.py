"""Report whether a run fits on its device, and what to change if it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnimg.config.schema import Config
from attnimg.facts import Finding, Machine
from attnimg.memory.architecture import read_architecture
from attnimg.memory.changes import ConfigChange, find_changes
from attnimg.memory.forecast import Forecast, forecast_memory
from attnimg.run_facts import Plan, Problem
from attnimg.selection.gpus_and_images import gpu_catalogue
from attnimg.selection.run_findings import device_memory


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReport:
    """The forecast of a run, and changes with which it fits.

    Attributes:
        forecast: the forecast.
        changes: changes with which the run fits; empty if it fits, or if no change helps.
        gpus: if the run does not fit and no change helps, the names of the GPUs with the least
            memory in which it fits.
    """

    forecast: Forecast
    changes: tuple[ConfigChange, ...] = ()
    gpus: tuple[str, ...] = ()


def report_memory(
    config: Config,
    raw: Mapping[str, Any],
    *,
    problem: Problem,
    plan: Plan,
    machine: Machine,
    is_valid: Callable[[Mapping[str, Any]], bool],
    stored_weights: int | None = None,
    processes: int = 1,
) -> MemoryReport:
    """Return the forecast of a run, and changes with which it fits if it does not surely fit.

    Args:
        config: the validated run.
        raw: the model's config.json.
        problem: what attention computes in the run.
        plan: the chosen backend.
        machine: the machine of the run.
        is_valid: whether `check` accepts the config with these values set.
        stored_weights: number of weights in the files of the model; None where they are not known.
        processes: processes that train together.

    Raises:
        AttnimgError: a field of config.json has a wrong type (code "bad-model").
    """
    # The catalogue of GPUs is read once for all forecasts.
    machine = replace(machine, memory_bytes=device_memory(machine))
    model = read_architecture(raw, problem.model, stored_weights=stored_weights)

    def forecast(changed: Config) -> Forecast:
        # The choice of a backend depends on none of these fields.
        rows = max(changed.micro_batch_size, changed.eval_batch_size or 0)
        of_run = replace(
            problem,
            rows=rows,
            sequence_len=changed.sequence_len,
            checkpointing=bool(changed.gradient_checkpointing),
        )
        return forecast_memory(
            changed, model, problem=of_run, plan=plan, machine=machine, processes=processes
        )

    found = forecast(config)
    if found.fits in (None, "yes") or found.why or found.available is None:
        return MemoryReport(forecast=found)
    cpu = machine.arch.vendor == "cpu"
    changes = find_changes(config, forecast, available=found.available, is_valid=is_valid, cpu=cpu)
    gpus = () if changes or cpu else _gpus_that_hold(found.high, machine)
    return MemoryReport(forecast=found, changes=changes, gpus=gpus)


def _gpus_that_hold(needed: int, machine: Machine) -> tuple[str, ...]:
    """Return the GPUs of the same vendor with the least memory that holds a number of bytes."""
    large = [
        gpu
        for gpu in gpu_catalogue().values()
        if gpu.arch.vendor == machine.arch.vendor and (gpu.memory_gb or 0) * 10**9 >= needed
    ]
    least = min((gpu.memory_gb or 0 for gpu in large), default=0)
    return tuple(gpu.name for gpu in large if gpu.memory_gb == least)


def memory_dict(report: MemoryReport) -> dict[str, Any]:
    """Return the report as JSON values; parts and range are null where there is no forecast."""
    found = report.forecast
    return {
        "parts": dict(found.parts) or None,
        "phase": found.phase or None,
        "low": found.low or None,
        "high": found.high or None,
        "available": found.available,
        "fits": found.fits,
        "why": found.why or None,
        "changes": [{"set": dict(one.values), "bytes": one.bytes} for one in report.changes],
        "gpus": list(report.gpus),
    }


def memory_line(report: MemoryReport) -> str:
    """Return the forecast in one line."""
    found = report.forecast
    if not found.parts:
        return f"memory: not known before loading: {found.why}"
    text = f"memory: {size_range(found)} at its peak, in the {found.phase}"
    if found.available is None:
        return text
    fits = {"yes": "it fits", "maybe": "it may fit", "no": "it does not fit", None: ""}[found.fits]
    return f"{text}, of {size(found.available)}: {fits}"


def memory_warning(report: MemoryReport) -> Finding | None:
    """Return a warning if even the low end of the forecast does not fit."""
    found = report.forecast
    if found.fits != "no" or found.available is None:
        return None
    return Finding(
        code="memory-too-small",
        key="micro_batch_size",
        what=f"the run needs {size_range(found)} of memory, more than the "
        f"{size(found.available)} of this device",
        do=changes_text(report),
    )


def changes_text(report: MemoryReport) -> str:
    """Return what to change so that the run fits, the change with the least effect first."""
    if report.changes:
        return ", or ".join(f"set {values_text(one.values)}" for one in report.changes)
    if report.gpus:
        return f"use a GPU with more memory: {' or '.join(report.gpus)}"
    return "use a smaller model: no change of this config makes it fit"


def values_text(values: Mapping[str, Any]) -> str:
    """Return values as in YAML, in one line."""

    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else str(value)

    return " and ".join(f"{key}: {text(value)}" for key, value in values.items())


def size_range(found: Forecast) -> str:
    """Return the range of a forecast, "5.1 to 6.9 GiB"."""
    return f"{found.low / 2**30:.1f} to {size(found.high)}"


def size(count: int) -> str:
    """Return bytes as GiB."""
    return f"{count / 2**30:.1f} GiB"

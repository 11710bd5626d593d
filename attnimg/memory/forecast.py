"""Forecast the peak of a run's memory: the largest sum of its parts over the phases of the run.

A phase is the loss, the backward pass of one layer, the optimizer's step or an evaluation; on a CPU
also the comparison of the loss before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from attnimg.config.schema import Config
from attnimg.facts import Machine
from attnimg.memory.activations import (
    evaluation_bytes,
    layer_bytes,
    loss_bytes,
    loss_check_bytes,
    untouched_bytes,
)
from attnimg.memory.amounts import Amount, amount
from attnimg.memory.architecture import Architecture
from attnimg.memory.parts import (
    BLOCKWISE,
    gradient_bytes,
    mapped_bytes,
    optimizer_bytes,
    weight_bytes,
)
from attnimg.memory.settings import (
    SMALL_LOGITS,
    RunSettings,
    read_settings,
    trained_weights,
    trains_head,
)
from attnimg.run_facts import Plan, Problem
from attnimg.selection.run_findings import device_memory, quadratic_memory

EVALUATION, LOSS_CHECK = "evaluation", "loss check"
_OTHER_PHASES = (EVALUATION, LOSS_CHECK)
Fits = Literal["yes", "maybe", "no"]

# Bytes of a process on a CPU before it loads a model: Python, torch and the libraries.
# Source: docs/measured/memory.json, the runs of the part "base" (2026-11-28).
CPU_BASE = 660 << 20
# On a CPU, the share of the heap that is free between its tensors: with all weights trained, and
# with an adapter, whose small tensors fragment the freed memory of large ones.
# Source: docs/measured/memory.json, the runs that calibrate it.
HEAP_FREE, HEAP_FREE_ADAPTER = 0.22, 0.70
# With checkpointing and all weights trained, the size of the heap beside the optimizer's states, as
# a multiple of its tensors. The backward pass allocates the tensors of each layer again, between
# those that are kept; an optimizer with large states fills a part of the holes.
# Source: as above, the run "adafactor, bf16, checkpointing" (2026-11-28).
HEAP_CHECKPOINTING = 2.0
# Bytes that CUDA's context and the libraries take on a GPU, with few and with many kernels, and the
# share that torch's allocator holds beyond the tensors. Assumed: no run has measured them yet.
CUDA_LOW, CUDA_HIGH = 400 << 20, 1200 << 20
GPU_OVERHEAD = 0.08
# The errors that the range allows for: of torch's allocations, and of a process on a CPU.
TENSOR_ERROR, PROCESS_ERROR = 0.10, 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The forecast of a run's memory.

    Attributes:
        parts: name of a part -> bytes at the peak.
        phase: the phase with the peak.
        step_tensors: bytes that torch allocates at the peak of a training step.
        total: the sum of the parts.
        low: the low end of the range, in bytes.
        high: the high end.
        available: bytes of the device; None when not known.
        why: why there is no forecast, or which parts it lacks; empty for a complete forecast.
    """

    parts: Mapping[str, int]
    phase: str
    step_tensors: int
    total: int
    low: int
    high: int
    available: int | None
    why: str = ""

    @property
    def fits(self) -> Fits | None:
        """Return whether the run fits; None if not known."""
        if self.available is None or not self.parts:
            return None
        if self.low > self.available:
            return "no"
        if self.why:
            return None
        return "yes" if self.high <= self.available else "maybe"


def forecast_memory(
    config: Config,
    model: Architecture | str,
    *,
    problem: Problem,
    plan: Plan,
    machine: Machine,
    processes: int = 1,
    small_logits: int = SMALL_LOGITS,
) -> Forecast:
    """Return the forecast of a run's memory.

    Args:
        config: the validated run.
        model: the sizes of the model, or why they are not known.
        problem: what attention computes in the run.
        plan: the chosen backend.
        machine: the machine of the run.
        processes: processes that train together.
        small_logits: bytes of a batch's float32 logits up to which a run keeps them.
    """
    available = device_memory(machine)
    if isinstance(model, str):
        return _unknown(model, available)
    if plan.chosen is None:
        return _unknown("no attention backend was chosen", available)
    run = read_settings(
        config, problem, machine, plan.chosen.backend,
        vocabulary=model.vocabulary, processes=processes, small_logits=small_logits,
    )  # fmt: skip
    if isinstance(run, str):
        return _unknown(run, available)
    if not trained_weights(model, run):
        return _unknown("lora_target_modules matches no layer that the forecast knows", available)
    if run.adapter and model.expert_weights and run.adapts_experts:
        return _unknown("the forecast does not know adapters on experts", available)
    if run.cpu and model.expert_weights and run.compute == 2:
        return _unknown(
            "experts in 16 bits take more memory on a CPU than their tensors", available
        )
    found = quadratic_memory(plan, problem)
    # The mask of the largest batch, which may be an evaluation batch.
    quadratic = found.layer * run.rows // problem.rows if found else 0
    phases = list_phases(model, run, quadratic=quadratic)
    phase, weights = largest_phase(phases), weight_bytes(model, run)
    parts = {"weights": weights} | {name: part.total for name, part in phases[phase].items()}
    tensors = sum(parts.values())
    steps = {name: of_phase for name, of_phase in phases.items() if name not in _OTHER_PHASES}
    step = weights + sum(part.total for part in steps[largest_phase(steps)].values())
    if run.cpu:
        untouched = {"loss": untouched_bytes(model, run, rows=run.rows),
                     EVALUATION: untouched_bytes(model, run, rows=run.eval_rows)}  # fmt: skip
        if phase in untouched:
            parts["loss" if phase == "loss" else "activations"] -= untouched[phase]
        total = CPU_BASE + weights + mapped_bytes(model, run)
        total += process_bytes(
            phases, untouched=untouched, adapter=run.adapter, checkpointing=run.checkpointing
        )
        parts |= {"base": CPU_BASE, "overhead": total - CPU_BASE - sum(parts.values())}
        low, high = int(total * (1 - PROCESS_ERROR)), int(total * (1 + PROCESS_ERROR))
    else:
        low = int(tensors * (1 - TENSOR_ERROR)) + CUDA_LOW
        high = int(tensors * (1 + TENSOR_ERROR + GPU_OVERHEAD)) + CUDA_HIGH
        parts |= {"base": (CUDA_LOW + CUDA_HIGH) // 2, "overhead": int(GPU_OVERHEAD * tensors / 2)}
        total = sum(parts.values())
    return Forecast(
        parts=parts,
        phase=phase,
        step_tensors=step,
        total=total,
        low=low,
        high=high,
        available=available,
    )


def process_bytes(
    phases: Mapping[str, Mapping[str, Amount]],
    *,
    untouched: Mapping[str, int],
    adapter: bool,
    checkpointing: bool,
) -> int:
    """Return the bytes of a process without its weights; freed small tensors stay in its heap.

    Args:
        phases: as list_phases returns them.
        untouched: phase -> bytes that are allocated and not written.
        adapter: whether an adapter is trained instead of all weights.
        checkpointing: whether activations are computed again in the backward pass.
    """
    heap = 0.0
    large = 0
    for name, parts in phases.items():
        small = sum(part.small for part in parts.values())
        rest = sum(part.total for part in parts.values()) - small
        free = HEAP_FREE_ADAPTER if adapter else HEAP_FREE
        if name == LOSS_CHECK and not adapter:
            free = 0.0  # it is the first phase, in a new heap
        heap = max(heap, small * (1 + free))
        if checkpointing and not adapter and name != LOSS_CHECK:
            states = parts.get("optimizer", Amount()).small
            heap = max(heap, (small - states) * HEAP_CHECKPOINTING)
        large = max(large, rest - untouched.get(name, 0))
    return int(heap) + large


def _unknown(why: str, available: int | None) -> Forecast:
    return Forecast(
        parts={}, phase="", step_tensors=0, total=0, low=0, high=0, available=available, why=why
    )


def list_phases(
    model: Architecture, run: RunSettings, *, quadratic: int
) -> dict[str, dict[str, Amount]]:
    """Return name of a phase -> name of a part -> bytes, without the weights.

    Args:
        model: the sizes of the model.
        run: the run.
        quadratic: bytes of a layer's attention that grow with the square of the row length.
    """
    gradients, states = gradient_bytes(model, run), optimizer_bytes(model, run)
    layers = [layer_bytes(layer, model, run, quadratic=quadratic) for layer in model.layers]
    counts = [layer.count for layer in model.layers]
    last_kept, loss = loss_bytes(model, run)
    head = amount([model.embeddings * run.embedding if trains_head(model, run) else 0])
    buckets = gradients if run.processes > 1 else Amount()
    kept = Amount()
    for count, layer in zip(counts, layers, strict=True):
        kept += (layer.input if run.checkpointing else layer.kept).times(count)
    if run.offloads:
        kept = layers[0].input.times(2)
    by_size = sorted(layers, key=lambda layer: layer.kept.total)
    # Checkpointing computes the activations of one layer again, at its backward pass.
    last = by_size[-1].kept if run.checkpointing else Amount()
    every = run.accumulates or run.processes > 1
    before = (gradients if every else head) + buckets
    # The gradient of the output layer follows that of kept logits, whose other tensors are freed.
    at_loss = Amount() if run.keeps_logits and not every else before
    after = gradients + buckets
    working = max((layer.working for layer in layers), key=lambda found: found.total)
    phases = {
        "loss": {"optimizer": states, "gradients": at_loss, "activations": kept + last_kept,
                 "loss": loss},
        "backward pass of the last layer": {
            "optimizer": states, "gradients": before, "activations": kept + last,
            "working memory": working},
        "backward pass of the first layer": {
            "optimizer": states, "gradients": after, "activations": by_size[0].kept,
            "working memory": working},
        "optimizer step": {
            "optimizer": states, "gradients": after, "working memory": _step_bytes(model, run)},
        EVALUATION: {"optimizer": states, "activations": evaluation_bytes(model, run)},
    }  # fmt: skip
    if run.cpu:
        # On a GPU, it is left out where the memory does not suffice.
        phases[LOSS_CHECK] = {"gradients": gradients, "loss": loss_check_bytes(model, run)}
    return phases


def largest_phase(phases: Mapping[str, Mapping[str, Amount]]) -> str:
    """Return the name of the phase with the most bytes."""
    return max(phases, key=lambda name: sum(part.total for part in phases[name].values()))


def _step_bytes(model: Architecture, run: RunSettings) -> Amount:
    """Return what the optimizer's step needs beside weights, gradients and states."""
    largest = max(size for _, size, _ in trained_weights(model, run))
    if run.optimizer == "adafactor":
        return amount(3 * [4 * largest])
    if run.cpu and run.optimizer in BLOCKWISE:
        # Measured: docs/measured/memory.json, the run "8-bit optimizer" (2026-11-28).
        return amount(5 * [4 * largest])
    if run.optimizer in ("adamw_torch", "adagrad", "rmsprop") and not run.cpu:
        return gradient_bytes(
            model, run
        )  # torch's foreach implementation creates temporary tensors
    return amount([0 if run.optimizer in ("adamw_torch_fused", "sgd") else 4 * largest])

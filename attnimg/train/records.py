"""Write the records of a run: metrics.jsonl, loss.png, receipt.json; draw its progress bar.

Each line of metrics.jsonl is on the disk before the next step begins.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attnimg.config.schema import Config
from attnimg.distributions import version
from attnimg.errors import AttnimgError
from attnimg.facts import Backend, Machine
from attnimg.machine.threads import THREAD_VARIABLES
from attnimg.run_facts import Plan, Proof, RunContext
from attnimg.selection.gpus_and_images import image_record
from attnimg.train.checkpoint import replace_text, write_errors

METRICS_FILE = "metrics.jsonl"

LOSS_PLOT_FILE = "loss.png"


def append_metrics(folder: Path, line: Mapping[str, object]) -> None:
    """Append one line. A single write to a file opened for appending can't be cut off by a kill.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    path = folder / METRICS_FILE
    data = (json.dumps(line) + "\n").encode()
    with write_errors(path, kept="the lines and checkpoints before it are kept"):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(handle, data) != len(data):
                raise OSError(28, "No space left on device")
        finally:
            os.close(handle)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Read all complete lines; a last line that a full disk cut off is left out."""
    path = folder / METRICS_FILE
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def remove_metrics_after(folder: Path, step: int, *, evaluate_again: bool) -> int:
    """Remove the lines that a resumed run will write again; return how many.

    Args:
        folder: output_dir.
        step: the checkpoint's step; later lines are removed.
        evaluate_again: whether the evaluation at `step` itself is repeated.
    """
    lines = read_metrics(folder)
    kept = [
        line
        for line in lines
        if line["step"] < step
        or (line["step"] == step and not (evaluate_again and "eval_loss" in line))
    ]
    if (folder / METRICS_FILE).is_file():
        replace_text(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))
    return len(lines) - len(kept)


@dataclass(slots=True)
class TokenCounter:
    """Count tokens and time between two logs.

    Attributes:
        total_tokens: real tokens trained on, earlier sessions included.
        tokens: real tokens since the last log.
        positions: token positions since the last log, padding included.
        since: start of this window on the monotonic clock, moved forward by pauses.
        started: when this session began.
    """

    total_tokens: int = 0
    tokens: int = 0
    positions: int = 0
    since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)

    def count(self, tokens: int, positions: int) -> None:
        """Add one batch."""
        self.tokens += tokens
        self.positions += positions

    def close_window(self, *, tokens: int, positions: int) -> dict[str, float]:
        """End the window and return its metrics; the arguments are the sums of all processes."""
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        self.total_tokens += tokens
        self.tokens = self.positions = 0
        return {
            "tokens": self.total_tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "filled": round(tokens / positions, 4) if positions else 1.0,
            "memory_bytes": memory_bytes(),
            "seconds": round(now - self.started, 3),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in the block from tokens per second; used for evaluations."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - began


def memory_bytes() -> int:
    """Return torch's peak of allocated GPU memory; without a GPU, this process's memory."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


# Where no bar can be drawn, progress is printed at most this often.
SECONDS_BETWEEN_LINES = 1.0


class ProgressView:
    """Draw the run's progress on `console`, which should be stderr's.

    Args:
        console: where to draw; a bar on a terminal, plain lines elsewhere.
        total: optimizer steps of the whole run.
        visible: False on every process but the first.
    """

    def __init__(self, console: Console, *, total: int, visible: bool = True) -> None:
        self.console, self.total, self.visible = console, total, visible
        self._last_line = float("-inf")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, figures="")

    def start(self, step: int) -> None:
        """Start drawing at `step`, which is above 0 in a resumed run."""
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def step(self, step: int) -> None:
        """Move to `step`."""
        self._bar.update(self._task, completed=step, description="training")

    def start_evaluation(self) -> None:
        """Show that the model is being evaluated, while the bar does not move."""
        self._bar.update(self._task, description="evaluating")

    def show_training(self, step: int, line: Mapping[str, float]) -> None:
        """Draw the values of a training log.

        Args:
            step: optimizer steps done.
            line: loss, tokens_per_second, filled (0 to 1) and memory_bytes.
        """
        figures = (
            f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tok/s  "
            f"{line['filled']:.1%} filled  {line['memory_bytes'] / 2**30:.2f} GiB"
        )
        self._bar.update(self._task, figures=figures)
        due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        bar = self.console.is_terminal
        if self.visible and not bar and (due or step in (1, self.total)):
            self._last_line = time.monotonic()
            self._print_step(step, figures)

    def show_evaluation(self, step: int, loss: float) -> None:
        """Print an evaluation's loss above the bar."""
        if self.visible:
            self._print_step(step, f"eval loss {loss:.4f}")

    def end(self) -> None:
        """Stop drawing; the last state stays."""
        self._bar.stop()

    def _print_step(self, step: int, text: str) -> None:
        print_line(self.console, f"step {step:>{len(str(self.total))}}/{self.total}  {text}")


def print_line(console: Console, text: str) -> None:
    """Print one line as it is, without markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# Colors that are distinct in print and for colour-blind readers (Okabe and Ito, 2008).
TRAIN_COLOR, EVAL_COLOR = "#0072B2", "#D55E00"


def plot_loss(folder: Path, *, title: str, subtitle: str) -> Path | None:
    """Draw metrics.jsonl as loss.png: the training loss, smoothed, and the evaluation loss.

    Args:
        folder: output_dir.
        title: what is shown.
        subtitle: the model, the attention backend and other settings that distinguish two plots.

    Returns:
        The path of the image; None when nothing was logged.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    lines = read_metrics(folder)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not train:
        return None
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    # A Figure made without pyplot needs no display and changes no global state.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.2, h_pad=0.1))
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    smoothed = len(train) > 20
    axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.25 if smoothed else 1, linewidth=1,
              marker="" if smoothed else ".", label=None if smoothed else "training")  # fmt: skip
    if smoothed:
        # The mean is over about a tenth of a short run, and over about fifty lines of a long one.
        weight = min(0.98, max(0.0, 1 - 10 / len(losses)))
        axes.plot(steps, smooth(losses, weight=weight), color=TRAIN_COLOR, linewidth=1.8,
                  label="training, smoothed")  # fmt: skip
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color=EVAL_COLOR, marker="o", markersize=4,
                  linewidth=1.5, label="evaluation")  # fmt: skip
        axes.annotate(f"{evaluation[-1][1]:.3f}", evaluation[-1], xytext=(4, 6),
                      textcoords="offset points", color=EVAL_COLOR, fontsize=9)  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=18)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="0.4")
    axes.set(xlabel="step", ylabel="loss per trained token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)
    path = folder / LOSS_PLOT_FILE
    with write_errors(path, kept="the model and metrics.jsonl are written"):
        figure.savefig(path)
    return path


def smooth(values: Sequence[float], *, weight: float) -> list[float]:
    """Return the mean of two running means, one from each end, so that their lags cancel.

    Args:
        values: one value per logged step.
        weight: weight of the mean so far against the next value; 0 for no smoothing.
    """
    forwards = _running_mean(values, weight=weight)
    backwards = _running_mean(values[::-1], weight=weight)[::-1]
    return [(a + b) / 2 for a, b in zip(forwards, backwards, strict=True)]


def _running_mean(values: Sequence[float], *, weight: float) -> list[float]:
    """Return the exponential running mean, with bias correction of the first values."""
    smoothed, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass)
    return smoothed


RECEIPT_FILE = "receipt.json"

PACKAGES = (
    "attnimg", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "kernels",
    "tokenizers", "deepspeed", "triton", "bitsandbytes", "safetensors", "numpy", "flash-attn",
    "flash-attn-3", "flash-attn-4", "xformers", "sageattention", "torchao", "liger-kernel",
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
        kernels: backend, or layer of a hub kernel -> hashes of the files that compute it, by their
            kind, such as "torch"; None where some are unknown.
        layers: liger key without its prefix -> the layers of the model that it replaced.
        hub_layers: layer of a hub kernel -> the layers of the model that it replaced ("layers"),
            and its "kernel" and "revision".
        other_proofs: proofs of those layers, and of an optimizer with quantized states.
    """

    machine: Machine
    plan: Plan
    implementation: str
    context: RunContext
    isolation: Mapping[str, object] | None = None
    proofs: tuple[Proof, ...] = ()
    kernels: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    hub_layers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    other_proofs: tuple[Proof, ...] = ()

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
        hub: what was pushed to the hub; None without hub_model_id.
        push_error: why the trained model was not pushed; None if it was.
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
    hub: Mapping[str, object] | None = None
    push_error: AttnimgError | None = None


def build_receipt(
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
        "started": utc_now(),
        "ended": None,
        "resumed_from": resumed_from,
        "config": config.model_dump(exclude_none=True),
        "versions": package_versions(),
        "image": image_record(os.environ),
        "hardware": run.machine,
        "threads": {name: os.environ.get(name) for name in THREAD_VARIABLES},
        "plan": _plan_record(run.plan),
        "attention": {"backend": run.backend, "implementation": run.implementation},
        "dtype": run.context.dtype,
        "context": run.context,
        "applied": None,
        "isolation": run.isolation,
        "proofs": run.proofs,
        "liger": run.layers,
        "use_kernels": run.hub_layers,
        "other_proofs": run.other_proofs,
        **figures,
        "metrics": {},
        "files": [],
        "error": None,
    }


def _plan_record(plan: Plan) -> dict[str, object]:
    """Return a plan with the names that `explain --json` has for its texts."""
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    texts = {"asked": "requested", "because": "reason", "do": "remedy"}
    return {name: values.pop(old) for name, old in texts.items()} | values


def package_versions() -> dict[str, str]:
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
    ended = None if status == "running" else utc_now()
    path = folder / RECEIPT_FILE
    with write_errors(path, kept="the checkpoints are kept"):
        text = json.dumps(to_json({**receipt, "status": status, "ended": ended}), indent=2)
        replace_text(path, text + "\n")
    return path


def utc_now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def to_json(value: object) -> object:
    """Return values as JSON types: a backend by its name, NaN and paths as strings."""
    if isinstance(value, Backend):
        return value.name
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(str(item) for item in value)
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)

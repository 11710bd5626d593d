"""Draw the losses of a run from its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnimg.train import metrics
from attnimg.train.disk import writing

FILE = "loss.png"

# Colours that stay apart in print and for colour-blind eyes (Okabe and Ito, 2008).
TRAIN, EVALUATION = "#0072B2", "#D55E00"


def smooth(values: Sequence[float], *, weight: float) -> list[float]:
    """Return the mean of two running means, one from each end, so that neither shift shows.

    Args:
        values: one a logged step.
        weight: of the mean so far, against the next value: 0 smooths nothing.
    """
    forwards = _running_mean(values, weight=weight)
    backwards = _running_mean(values[::-1], weight=weight)[::-1]
    return [(a + b) / 2 for a, b in zip(forwards, backwards, strict=True)]


def _running_mean(values: Sequence[float], *, weight: float) -> list[float]:
    """Return the exponential running mean; its first values are not drawn towards zero."""
    smoothed, mean, mass = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(mean / mass)
    return smoothed


def draw_loss(folder: Path, *, title: str, subtitle: str) -> Path | None:
    """Draw metrics.jsonl as loss.png: the training loss, smoothed, and the evaluation loss.

    Args:
        folder: output_dir.
        title: the model.
        subtitle: the attention backend and what else tells two plots apart.

    Returns:
        The picture; None when nothing was logged.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    lines = metrics.read(folder)
    train = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    evaluation = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if not train:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A bare Figure draws without pyplot, so no display and no global state are touched.
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = zip(*train, strict=True)
    many = len(train) > 20
    axes.plot(steps, losses, color=TRAIN, alpha=0.25 if many else 1, linewidth=1,
              marker="" if many else ".", label=None if many else "training")  # fmt: skip
    if many:
        # Over a tenth or so of a short run, over fifty lines of a long one.
        weight = min(0.98, max(0.0, 1 - 10 / len(losses)))
        axes.plot(steps, smooth(losses, weight=weight), color=TRAIN, linewidth=1.8,
                  label="training, smoothed")  # fmt: skip
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color=EVALUATION, marker="o", markersize=4,
                  linewidth=1.5, label="evaluation")  # fmt: skip
        axes.annotate(f"{evaluation[-1][1]:.3f}", evaluation[-1], xytext=(4, 6),
                      textcoords="offset points", color=EVALUATION, fontsize=9)  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=18)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=9, color="0.4")
    axes.set(xlabel="step", ylabel="loss per trained token (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.legend(frameon=False)
    path = folder / FILE
    with writing(path, kept="the model and metrics.jsonl are written"):
        figure.savefig(path)
    return path

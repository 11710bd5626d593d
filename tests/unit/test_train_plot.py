"""Test that the plot of a run has margins, and that its smoothed line lies among the losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from attnimg.train.records import METRICS_FILE, plot_loss, smooth


def test_a_falling_loss_is_smoothed_without_a_lag() -> None:
    losses = [7.0 - 0.02 * step for step in range(100)]
    smoothed = smooth(losses, weight=0.9)
    for step in range(40, 60):  # one running mean would lag by 0.18
        assert smoothed[step] == pytest.approx(losses[step], abs=0.02)
    assert abs(smoothed[0] - losses[0]) < 0.1
    assert abs(smoothed[-1] - losses[-1]) < 0.1


def test_noise_is_smoothed_and_a_constant_is_kept() -> None:
    assert smooth([3.0] * 40, weight=0.9) == pytest.approx([3.0] * 40)
    noisy = [3.0 + math.sin(7 * step) for step in range(200)]
    assert max(abs(value - 3.0) for value in smooth(noisy, weight=0.95)[20:-20]) < 0.1
    assert smooth(noisy, weight=0.0) == pytest.approx(noisy)


@pytest.mark.parametrize("steps", [3, 2000])
def test_nothing_is_drawn_at_the_edges_of_the_picture(tmp_path: Path, steps: int) -> None:
    from matplotlib.image import imread

    lines = [{"step": step, "loss": 8 / step} for step in range(1, steps + 1)]
    lines.append({"step": steps, "eval_loss": 1234.5})
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = plot_loss(tmp_path, title="Training loss", subtitle="base model m, attention sdpa")
    assert picture is not None
    pixels = imread(picture)[..., :3].min(axis=2)
    edge = 15  # 0.1 inch
    for strip in (pixels[:, :edge], pixels[:, -edge:], pixels[:edge], pixels[-edge:]):
        assert strip.min() == 1, "found ink in the margin"
    assert pixels.min() < 0.5

"""The smoothed line of the plot lies among the losses that it smooths."""

from __future__ import annotations

import math

import pytest

from attnimg.train.records import smooth


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

"""Stop a run whose loss stays above a threshold, before it saves another checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# axolotl's default. Source: axolotl 0.19.0, utils/callbacks/__init__.py, LossWatchDogCallback
# (2026-11-27)
PATIENCE = 3


class LossWatchdog:
    """Count the optimizer steps in a row whose loss is above a threshold.

    Args:
        threshold: the highest loss that is accepted; None accepts any.
        patience: steps in a row above it that end the run; None is axolotl's default.

    Attributes:
        loss: the loss of the last counted step, averaged over all processes.
        high_steps: steps in a row, up to the last counted one, whose loss is above the threshold.
    """

    def __init__(self, threshold: float | None, patience: int | None) -> None:
        self.threshold, self.patience = threshold, patience or PATIENCE
        self.loss, self.high_steps = 0.0, 0
        self._sum: Any = None

    def add(self, loss: Any) -> None:
        """Add the loss of a micro-batch to that of its step."""
        if self.threshold is not None:
            self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()

    def count_step(self, mean: Callable[[Any], Any]) -> bool:
        """Count the step of the added losses, if there are any; return whether the run must end.

        Args:
            mean: returns the mean of a tensor over all processes, so that all decide alike.
        """
        if self.threshold is None or self._sum is None:
            return False
        self.loss, self._sum = float(mean(self._sum)), None
        self.high_steps = self.high_steps + 1 if self.loss > self.threshold else 0
        return self.high_steps >= self.patience

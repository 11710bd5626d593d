"""Show how a run goes: one bar on a terminal, one line a log elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Where no bar can be drawn, a line a second is enough to see that the run lives.
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
        self._figures = ""
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

    def begin(self, step: int) -> None:
        """Start drawing at `step`, where a resumed run goes on."""
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def step(self, step: int) -> None:
        """Move to `step`."""
        self._bar.update(self._task, completed=step, description="training")

    def evaluating(self) -> None:
        """Say that the model is being evaluated, so that a bar that stands still is understood."""
        self._bar.update(self._task, description="evaluating")

    def figures(self, step: int, line: Mapping[str, float]) -> None:
        """Show a training log.

        Args:
            step: optimizer steps done.
            line: loss, tokens_per_second, filled (0 to 1) and memory_bytes.
        """
        self._figures = describe(line)
        self._bar.update(self._task, figures=self._figures)
        due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if due or step in (1, self.total):
            self._print_line(f"step {step:>{len(str(self.total))}}/{self.total}  {self._figures}")

    def evaluated(self, step: int, loss: float) -> None:
        """Show an evaluation's loss; it stays on the screen."""
        if self.visible:
            self.console.print(
                f"step {step:>{len(str(self.total))}}/{self.total}  eval loss {loss:.4f}",
                highlight=False,
                markup=False,
            )

    def end(self) -> None:
        """Stop drawing; the last state stays."""
        self._bar.stop()

    def _print_line(self, text: str) -> None:
        if self.visible and not self.console.is_terminal:
            self._last_line = time.monotonic()
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(line: Mapping[str, float]) -> str:
    """Put a training log into words: loss, speed, filled share, memory."""
    return (
        f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tok/s  "
        f"{line['filled']:.1%} filled  {line['memory_bytes'] / 2**30:.2f} GiB"
    )

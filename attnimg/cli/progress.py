"""Show the progress of long tasks on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from attnimg.cli import as_text
from attnimg.train.records import SECONDS_BETWEEN_LINES, print_line


class TaskProgress:
    """Print lines and the progress of one task after the other; use it as a context manager."""

    def __init__(self) -> None:
        self.console = as_text.console(sys.stderr)
        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._tasks = dict[str, int]()
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Stop drawing; the bar is removed."""
        self._bar.stop()

    def log(self, text: str) -> None:
        """Print a line."""
        print_line(self.console, f"  {text}")

    def advance(self, task: str, done: int, total: int) -> None:
        """Show how much of a task is done."""
        if self.console.is_terminal:
            if task not in self._tasks:
                self._tasks[task] = self._bar.add_task(task, total=total)
            self._bar.update(TaskID(self._tasks[task]), completed=done)
            return
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or done == total:
            self._last_line = time.monotonic()
            self.log(f"{task}: {done / max(total, 1):.0%}")


def exit_on_sigterm() -> None:
    """Make SIGTERM end the process with exit code 143, after unfinished files are removed."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, leave)

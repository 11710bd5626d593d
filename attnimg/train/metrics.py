"""metrics.jsonl: one line per log, on the disk before the next step begins."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from attnimg.train.disk import replace_text, writing

FILE = "metrics.jsonl"


def append(folder: Path, line: Mapping[str, object]) -> None:
    """Add one line. A single write to a file opened for appending can't be torn by a kill.

    Raises:
        AttnimgError: the disk is full (disk-full).
    """
    path = folder / FILE
    data = (json.dumps(line) + "\n").encode()
    with writing(path, kept="the lines and checkpoints before it are kept"):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.write(handle, data) != len(data):
                raise OSError(28, "No space left on device")
        finally:
            os.close(handle)


def read(folder: Path) -> list[dict[str, float]]:
    """Read all whole lines; a last line that a full disk tore is left out."""
    path = folder / FILE
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def cut_after(folder: Path, step: int, *, evaluate_again: bool) -> int:
    """Drop the lines that a resumed run will write again; tell how many.

    Args:
        folder: output_dir.
        step: of the checkpoint; lines past it go.
        evaluate_again: whether the evaluation at `step` itself is repeated.
    """
    lines = read(folder)
    kept = [
        line
        for line in lines
        if line["step"] < step
        or (line["step"] == step and not (evaluate_again and "eval_loss" in line))
    ]
    if (folder / FILE).is_file():
        replace_text(folder / FILE, "".join(json.dumps(line) + "\n" for line in kept))
    return len(lines) - len(kept)


@dataclass(slots=True)
class Meter:
    """Counts tokens and time between two logs; the engine's own, so it may change.

    Attributes:
        total_tokens: real tokens trained on, earlier sessions included.
        tokens: real tokens since the last log.
        places: token places computed or paid for since the last log.
        since: when this window began, on the monotonic clock, pauses taken out.
        started: when this session began.
    """

    total_tokens: int = 0
    tokens: int = 0
    places: int = 0
    since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)

    def count(self, tokens: int, places: int) -> None:
        """Add one batch."""
        self.tokens += tokens
        self.places += places

    def close_window(self, *, tokens: int, places: int) -> dict[str, float]:
        """End the window and give its figures; tokens and places are those of all processes."""
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        self.total_tokens += tokens
        self.tokens = self.places = 0
        return {
            "tokens": self.total_tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "filled": round(tokens / places, 4) if places else 1.0,
            "memory_bytes": memory_bytes(),
            "seconds": round(now - self.started, 3),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time in the block, an evaluation or a save, out of tokens per second."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.since += time.monotonic() - began


def memory_bytes() -> int:
    """Tell the GPU memory torch holds at its highest, or this process's memory without a GPU."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)

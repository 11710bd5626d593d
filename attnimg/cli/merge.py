"""Run `attnimg merge`: merge a run's adapter into its base model."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from attnimg.cli import json_line
from attnimg.cli.progress import TaskProgress, exit_on_sigterm
from attnimg.errors import AttnimgError, printable
from attnimg.runs.folder import RunFolder, find_run
from attnimg.runs.merge import merge as merge_run
from attnimg.runs.merge import size_text
from attnimg.train.environment import silence_libraries
from attnimg.train.packages import require_trainer

if TYPE_CHECKING:
    from attnimg.runs.logits import LogitsComparison

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}  # fmt: skip


def merge(
    run: str,
    output: str | None,
    dtype: str | None,
    max_shard_size: str,
    base_model: str | None,
    as_json_lines: bool,
) -> None:
    """Merge the adapter of a run into its base model, and compare the logits of both."""
    shard_bytes = parse_size(max_shard_size)
    require_trainer()
    exit_on_sigterm()
    found = find_run(run, command="merge", base_model=base_model)
    silence_libraries()
    target = Path(output).expanduser() if output else default_output(found)
    with TaskProgress() as progress:
        for note in found.notes:
            progress.log(f"warning: {note}")
        merged = merge_run(
            found, output=target, dtype=dtype, shard_bytes=shard_bytes, report=progress
        )
        if merged.dequantized:
            progress.log(f"the weights of {merged.base_model} were dequantized")
        for line in logits_lines(merged.logits, dtype=merged.dtype):
            progress.log(line)
        files = sum(name.endswith(".safetensors") for name in merged.files)
        progress.log(
            f"{size_text(merged.size)} in {files} file{'s' * (files > 1)}, {merged.seconds:.0f} s"
        )
    if as_json_lines:
        print(json_line(asdict(merged) | {"folder": str(target), "adapter": str(merged.adapter)}))
    else:
        print(printable(str(target)) if sys.stdout.isatty() else target)


def logits_lines(logits: LogitsComparison, *, dtype: str) -> list[str]:
    """Return the result of the comparison with the adapter's logits, and a warning."""
    compared = (
        f"the relative difference is {logits.difference:.1e} (allowed {logits.tolerance:.0e} with "
        f"weights in {dtype})"
    )
    if logits.kept is None:
        return [
            f"the logits of {logits.tokens} tokens equal the base model's: {compared}",
            "warning: the adapter has no effect on the logits; the merged model is the base model",
        ]
    kept = f"{max(logits.kept, 0.0):.1%} of the adapter's effect"
    if not logits.is_rounded_off:
        return [f"the logits of {logits.tokens} tokens equal the adapter's: {compared}; {kept}"]
    finer = "" if dtype == "float32" else "; pass --dtype float32"
    return [
        f"the logits of {logits.tokens} tokens are near the adapter's: {compared}",
        f"warning: {kept} survives in {dtype}{finer}",
    ]


def default_output(run: RunFolder) -> Path:
    """Return the folder to write: in the run's folder, but not in a checkpoint."""
    if run.folder in run.checkpoints:
        return run.folder.with_name(f"merged-{run.folder.name}")
    return run.folder / "merged"


def parse_size(text: str) -> int:
    """Return a number of bytes, such as 5GB or 500MB.

    Raises:
        AttnimgError: code bad-value.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?I?B|)", text.strip().upper())
    size = int(float(match[1]) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise AttnimgError(
            f"--max-shard-size {text[:40]} is not a size",
            why="needed a number of bytes with a unit, such as 5GB or 500MB",
            do="pass --max-shard-size 5GB",
            code="bad-value",
        )
    return size

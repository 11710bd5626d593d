"""Run `attnimg evaluate`: compute the loss of a run's model on its evaluation data."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

from attnimg.cli import json_line
from attnimg.cli.progress import TaskProgress, exit_on_sigterm
from attnimg.cli.train import PrintedReport
from attnimg.errors import AttnimgError, counted, printable
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.runs.evaluate import Evaluation, find_target
from attnimg.runs.evaluate import evaluate as evaluate_target
from attnimg.runs.evaluate_preferences import PreferenceEvaluation
from attnimg.task import installed_machine
from attnimg.train.packages import require_trainer


def evaluate(run: str, base: bool, base_model: str | None, as_json_lines: bool) -> None:
    """Compute the loss of test_datasets with a run's model, as training does."""
    require_trainer()
    require_one_process("evaluate")
    exit_on_sigterm()
    target = find_target(run, base=base, base_model=base_model)
    machine = installed_machine()
    use_shipped_kernels(machine)
    with TaskProgress() as progress:
        for note in target.notes:
            progress.log(f"note: {note}")
        report = PrintedReport(progress.console)
        results = evaluate_target(target, machine, report=report, advance=progress.advance)
    for result in results:
        if as_json_lines:
            print(json_line({"weights": target.weights, **asdict(result)}))
        else:
            text = result_text(result)
            print(printable(text) if sys.stdout.isatty() else text)


def result_text(result: Evaluation | PreferenceEvaluation) -> str:
    """Return a result as one line."""
    name = f"{result.dataset} ({result.path})" if result.path else result.dataset
    if isinstance(result, PreferenceEvaluation):
        values = "".join(f", {key} {value:.4f}" for key, value in result.metrics.items())
        return (
            f"{name}: {result.rl} loss {result.loss:.4f}{values}, {result.documents:,} records, "
            f"{result.tokens:,} tokens"
        )
    error = "" if result.standard_error is None else f" +- {result.standard_error:.4f}"
    return (
        f"{name}: loss {result.loss:.4f}{error}, perplexity {result.perplexity:,.2f}, "
        f"{counted(result.documents, 'document')}, {counted(result.tokens, 'token')}, "
        f"{result.trained_tokens:,} with loss"
    )


def require_one_process(command: str) -> None:
    """Raise if torchrun or accelerate started several processes.

    Raises:
        AttnimgError: code bad-environment.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise AttnimgError(
            f"attnimg {command} runs in one process",
            why=f"found WORLD_SIZE={os.environ['WORLD_SIZE']}",
            do=f"start attnimg {command} without torchrun or accelerate",
            code="bad-environment",
        )

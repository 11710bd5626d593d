"""Run `attnimg train`: train a model by a YAML config."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from attnimg import config
from attnimg.cli import as_text
from attnimg.config.schema import CheckResult, Config
from attnimg.config.without_effect import keys_without_effect
from attnimg.errors import printable
from attnimg.facts import Finding
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.run_facts import Plan
from attnimg.task import Task, cpu_warnings, gpu_text, installed_machine, machine_warnings
from attnimg.train import run
from attnimg.train.distributed import StopFlag, Stopped, rank, require_group, stop_signals
from attnimg.train.environment import require_parsable
from attnimg.train.packages import require_trainer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class PrintedReport:
    """Print the plans, proofs and warnings of a run as text, the same ones once.

    Attributes:
        console: where they are printed.
        warnings: what was printed.
        plans: the choices of the plans that were printed.
    """

    console: Console
    warnings: list[Finding] = field(default_factory=list)
    plans: list[tuple[object, ...]] = field(default_factory=list)

    def log(self, text: str) -> None:
        """Print a line."""
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    def warn_replaced(self, text: str) -> None:
        """Print why a backend is replaced by the next candidate."""
        self.log(text)

    def show_plan(self, plan: Plan, task: Task, warnings: Sequence[Finding]) -> None:
        """Print a plan, unless the last one has the same choice, and its warnings."""
        chosen = plan.chosen and (plan.chosen.backend.name, plan.chosen.kernel)
        groups = [(choice.layers, choice.verdict.backend.name) for choice in plan.groups]
        printed = (plan.requested, chosen, groups)
        if self.plans[-1:] != [printed]:
            self.plans.append(printed)
            as_text.print_plan(plan, gpu=gpu_text(task.machine), out=self.console)
        self.warn(warnings)

    def warn(self, warnings: Sequence[Finding]) -> None:
        """Print warnings that were not printed yet."""
        new = [warning for warning in warnings if warning not in self.warnings]
        self.warnings.extend(new)
        as_text.print_warnings(new, err=self.console)


def train(file: str, settings: list[str]) -> None:
    """Train a model: select and verify the attention backend, check packing, then train."""
    require_trainer()
    require_parsable(os.environ)
    require_group()
    console = as_text.console(sys.stderr)
    console.quiet = rank() != 0
    try:
        with stop_signals() as stop:
            train_file(file, settings, report=PrintedReport(console), stop=stop)
    except Stopped as stopped:
        state = "nothing was trained yet"
        if stopped.checkpoint is not None:
            state = f"saved {stopped.checkpoint}; resume with resume_from_checkpoint=true"
        console.print(f"attnimg: {stopped}; {state}", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(stopped.exit_code) from None


def train_file(
    file: str, settings: Sequence[str], *, report: PrintedReport, stop: StopFlag
) -> None:
    """Check a config file, train it, and print the files that were written."""
    checked = config.check_file(file, overrides=tuple(settings))
    machine = installed_machine()
    use_shipped_kernels(machine)
    warnings = (*checked.warnings, *machine_warnings(machine))
    if checked.config is not None:
        warnings += cpu_warnings(checked.config, machine)
    values = _require_valid(replace(checked, warnings=warnings), report.console)
    for note in keys_without_effect(values):
        report.log(f"warning: {note}")
    result = run.train(values, machine, report=report, stop=stop)
    for path in result.files if rank() == 0 else ():
        # Control characters in the path are escaped for a terminal, but not for scripts.
        print(printable(str(path)) if sys.stdout.isatty() else path)
    if result.push_error is not None:
        raise result.push_error


def _require_valid(checked: CheckResult, console: Console) -> Config:
    """Return the config after printing its warnings; print its errors and exit if it has any."""
    if not checked.ok:
        console.quiet = False  # every rank prints its errors
    as_text.print_findings(checked, err=console)
    if checked.config is None or not checked.ok:
        raise SystemExit(2)
    return checked.config

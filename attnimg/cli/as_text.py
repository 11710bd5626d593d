"""Print the results of check and explain as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnimg.cli import Styled, findings_text
from attnimg.errors import counted, printable
from attnimg.facts import Backend, Finding, Machine
from attnimg.memory.report import MemoryReport, memory_line, size, values_text
from attnimg.run_facts import LayerGroup, Model, Plan, Problem, Reason
from attnimg.selection.run_findings import OtherLayers, describe_other_layers, other_layers

if TYPE_CHECKING:
    from attnimg.config.schema import CheckResult


# Smaller parts of a run's memory are not printed; JSON has them.
_SHOWN_BYTES = 2**30 // 20


class PrintableConsole(Console):
    """A rich console that escapes control characters in the text that it prints.

    They may be in file names, configs and messages of libraries. Markup and styles are kept.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the rendered text, with its control characters escaped."""
        return super().render_str(printable(text), **options)


def console(file: IO[str]) -> Console:
    """Return a console with the width of the terminal, or 100 columns without one."""
    screen = PrintableConsole(file=file, highlight=False, emoji=False)
    if not screen.is_terminal:
        screen = PrintableConsole(file=file, highlight=False, emoji=False, width=100)
    return screen


def styled(text: Styled) -> Text:
    """Return pieces of text with their styles, their control characters escaped."""
    return Text.assemble(*((printable(piece), style) for piece, style in text))


def print_findings(checked: CheckResult, *, err: Console) -> None:
    """Print errors and warnings: what happened, why, what to do."""
    for text in findings_text(checked.errors, "error"):
        err.print(styled(text), soft_wrap=True)
    print_warnings(checked.warnings, err=err)


def print_warnings(warnings: Iterable[Finding], *, err: Console) -> None:
    """Print warnings: what happened, what to do."""
    for text in findings_text(warnings, "warning"):
        err.print(styled(text), soft_wrap=True)


def print_plan(plan: Plan, *, gpu: str, out: Console) -> None:
    """Print the three lines of a plan: asked, got, because."""
    got = "[red]nothing[/]"
    if plan.chosen:
        name, kernel = plan.chosen.backend.name, plan.chosen.kernel or ""
        got = f"[bold green]{escape(name)}[/]  ({escape(kernel)})"
    grid = Table.grid(padding=(0, 2))
    grid.add_row("  [dim]asked[/]", escape(plan.requested))
    grid.add_row("  [dim]got[/]", f"{got}  on {escape(gpu)}")
    for choice in plan.groups:
        name = escape(choice.verdict.backend.name)
        text = f"{_layer_text(choice.layers)}: [bold green]{name}[/]"
        grid.add_row("  [dim]layers[/]", text)
    grid.add_row("  [dim]because[/]", escape(plan.reason))
    if not plan.chosen and plan.remedy:
        grid.add_row("  [dim]do[/]", escape(plan.remedy))
    out.print(grid)


def explained_text(
    plan: Plan, *, gpu: str, model: Model | None, problem: Problem, machine: Machine
) -> str:
    """Return what print_explained prints, without colors, 100 columns wide."""
    from io import StringIO

    file = StringIO()
    out = PrintableConsole(file=file, width=100, color_system=None, highlight=False, emoji=False)
    others = other_layers(model, machine)
    print_explained(plan, gpu=gpu, model=model, problem=problem, others=others, out=out)
    lines = [line.rstrip() for line in file.getvalue().strip("\n").splitlines()]
    return "\n".join(lines)


def print_explained(
    plan: Plan,
    *,
    gpu: str,
    model: Model | None,
    problem: Problem,
    others: tuple[OtherLayers, ...] = (),
    out: Console,
) -> None:
    """Print a plan, the model and the run, then all candidates with their reasons."""
    out.print()
    print_plan(plan, gpu=gpu, out=out)
    grid = Table.grid(padding=(0, 2))
    grid.add_row("  [dim]model[/]  ", escape(_model_text(model)))
    grid.add_row("  [dim]run[/]", escape(_problem_text(problem)))
    for layers in others:
        grid.add_row("  [dim]other[/]", escape(describe_other_layers(layers)))
    for sentence in model.unknown if model else ():
        grid.add_row("  [dim]unknown[/]", escape(sentence))
    out.print(grid)
    out.print()
    out.print(_candidates(plan))


def print_memory(report: MemoryReport, *, out: Console) -> None:
    """Print the forecast of a run's memory, its parts, and changes with which it fits."""
    grid = Table.grid(padding=(0, 2))
    line = memory_line(report).removeprefix("memory").removeprefix(":").strip()
    grid.add_row("  [dim]memory[/] ", escape(line))
    found = sorted(report.forecast.parts.items(), key=lambda part: -part[1])
    parts = [f"{name} {size(count)}" for name, count in found if count >= _SHOWN_BYTES]
    if parts:
        grid.add_row("", escape(", ".join(parts)))
    for change in report.changes:
        text = f"{values_text(change.values)}: at most {size(change.bytes)}"
        grid.add_row("  [dim]fits with[/]", escape(text))
    if report.gpus:
        grid.add_row("  [dim]fits on[/]", escape(" or ".join(report.gpus)))
    out.print()
    out.print(grid)


def _candidates(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("candidate", no_wrap=True)
    table.add_column("fits")
    table.add_column("reasons", ratio=1)
    for verdict in plan.verdicts:
        name = verdict.backend.name
        is_chosen = plan.chosen is not None and plan.chosen.backend.name == name
        text = escape(f"{verdict.kernel or ''}{_selectable_by(verdict.backend)}")
        if not verdict.fits:
            text = _reasons(verdict.reasons)
        table.add_row(
            str(verdict.rank),
            f"[bold green]{name}[/]" if is_chosen else escape(name),
            ("[bold green]taken[/]" if is_chosen else "[green]yes[/]")
            if verdict.fits
            else "[red]no[/]",
            text,
        )
    return table


def _reasons(reasons: tuple[Reason, ...]) -> str:
    """Return the text of the first reason and the codes of the others; JSON has all texts."""
    first, *others = reasons
    text = f"[dim]{first.code}:[/] {escape(first.text)}"
    codes = list(dict.fromkeys(reason.code for reason in others if reason.code != first.code))
    return f"{text} [dim]+ {', '.join(codes)}[/]" if codes else text


def _selectable_by(backend: Backend) -> str:
    """Return how a fitting backend can be chosen: by auto, by a name in the config, or not yet."""
    if backend.applied_as is None:
        return "  (checked only: this version cannot apply it)"
    if not backend.in_config:
        return "  (only with auto)"
    return "" if backend.automatic else "  (only when the config names it)"


def _model_text(model: Model | None) -> str:
    if model is None:
        return "not on this machine: head sizes, windows and sinks are not known"
    parts = [_layer_text(group) for group in model.layers]
    if others := sum(count for _, count in model.other_layers):
        parts.append(f"{counted(others, 'layer')} without softmax attention")
    return f"{model.type}: {'; '.join(parts) or 'no attention layers found'}"


def _layer_text(group: LayerGroup) -> str:
    size = f"head_dim {group.head_dim_qk}"
    if group.head_dim_v != group.head_dim_qk:
        size += f"/{group.head_dim_v}"
    text = ", ".join((counted(group.count, "layer"), counted(group.heads, "head"),
                      counted(group.kv_heads, "kv_head"), size))  # fmt: skip
    extras = [
        f"window {group.window}" if group.window else "",
        f"softcap {group.softcap:g}" if group.softcap else "",
        "sinks" if group.sinks else "",
    ]
    return ", ".join([text, *filter(None, extras)])


def _problem_text(problem: Problem) -> str:
    rows = "packed rows" if problem.packing else "one document per row"
    return f"{problem.dtype}, {rows}, forward and backward"

"""Run `attnimg verify`: prove every backend that fits this machine against float64."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnimg import config
from attnimg.cli import as_text, json_line
from attnimg.errors import AttnimgError
from attnimg.facts import Machine
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.pipeline import prove_fitting
from attnimg.run_facts import LayerGroup, Model, Problem, Proof
from attnimg.selection.plan import training_dtype
from attnimg.task import Task, gpu_text, installed_machine, read_task
from attnimg.train.environment import require_parsable

if TYPE_CHECKING:
    from rich.console import Console

# Used without a config: GQA with head_dim 64 and 128, as most models have, packed and not.
_SIZES = (
    LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=64, head_dim_v=64),
    LayerGroup(count=1, heads=8, kv_heads=2, head_dim_qk=128, head_dim_v=128, window=1024),
)
_SEQUENCE_LEN = 1024


def verify(file: str | None, settings: list[str], as_json_lines: bool) -> None:
    """Prove every backend that fits here: outputs, gradients, and no leak between documents."""
    require_parsable(os.environ)
    console = as_text.console(sys.stderr)

    def log(text: str) -> None:
        console.print(f"  {text}", style="dim", highlight=False, markup=False, soft_wrap=True)

    machine = installed_machine()
    use_shipped_kernels(machine)
    results: list[tuple[Problem, Proof]] = []
    for task in _tasks(file, settings, machine):
        results += prove_fitting(task, log=log)
    ok = bool(results) and all(proof.passed for _, proof in results)
    if as_json_lines:
        proofs_json = [_json(problem, proof) for problem, proof in results]
        on, gpu = machine.arch.name, machine.gpu
        print(json_line({"on": on, "gpu": gpu, "ok": ok, "proofs": proofs_json}))
    else:
        _print(results, machine=machine, out=as_text.console(sys.stdout))
    raise SystemExit(0 if ok else 1)


def _tasks(file: str | None, settings: list[str], machine: Machine) -> list[Task]:
    """Return the tasks whose backends are verified: the config's, or one packed and one not."""
    if file is None:
        dtype = training_dtype(bf16="auto", fp16=False, arch=machine.arch)
        unpacked = Problem(
            model=Model(type="llama", layers=_SIZES),
            dtype=dtype,
            packing=False,
            dropout=0.0,
            compiled=False,
            checkpointing=False,
            sequence_len=_SEQUENCE_LEN,
            rows=1,
            autocast=dtype != "float32",
        )
        problems = (unpacked, replace(unpacked, packing=True))
        return [Task(machine=machine, problem=p, requested=None, strict=False) for p in problems]
    checked = config.check_file(file, overrides=tuple(settings))
    if checked.config is None:
        (error,) = checked.errors
        raise AttnimgError(error.what, why=error.why, do=error.do, code=error.code, key=error.key)
    if not checked.ok:
        why = "\n".join(f"{error.code}: {error.what}" for error in checked.errors)
        raise AttnimgError(
            f"{file} is not a valid config",
            why=why,
            do=f"run attnimg check {shlex.join([file, *settings])}",
            code="bad-config",
        )
    return [read_task(checked.config, machine)[0]]


def _json(problem: Problem, proof: Proof) -> dict[str, Any]:
    values = asdict(proof)
    # A missing bound is infinite, which JSON does not have.
    values["figures"] = [
        {
            name: None if value in (float("inf"), float("-inf")) else value
            for name, value in f.items()
        }
        for f in values["figures"]
    ]
    return {"passed": proof.passed, "packing": problem.packing, "dtype": problem.dtype, **values}


def _print(results: list[tuple[Problem, Proof]], *, machine: Machine, out: Console) -> None:
    """Print a row for each proof, with the error nearest to its bound, then why proofs failed."""
    out.print(f"\n  proofs on {escape(gpu_text(machine))}\n")
    table = Table(box=None, padding=(0, 2, 0, 2), header_style="dim")
    table.add_column("backend", no_wrap=True)
    for header in ("rows", "passed", "probes", "worst", "error", "allowed", "ms"):
        table.add_column(header, justify="left" if header in ("rows", "passed") else "right")
    for problem, proof in results:
        worst = max(proof.figures, key=lambda f: f.error / f.allowed, default=None)
        table.add_row(
            escape(proof.backend),
            "packed" if problem.packing else "single",
            "[green]yes[/]" if proof.passed else "[bold red]no[/]",
            str(proof.cases),
            *((worst.quantity, f"{worst.error:.1e}", f"{worst.allowed:.1e}") if worst else "---"),
            "cached" if proof.cached else f"{1000 * proof.seconds:.0f}",
        )
    out.print(table)
    for _, proof in results:
        for reason in proof.reasons:
            text = f"  [red]{reason.code}[/] {escape(proof.backend)}: {escape(reason.text)}"
            out.print(text, soft_wrap=True)
        if proof.note:
            out.print(f"  [dim]note[/] {escape(proof.backend)}: {escape(proof.note)}")

"""`attnimg train`: one run, from a YAML file to a model.

config -> plan, printed -> inputs -> tokenizer, documents -> model -> proof -> fit
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnimg import apply, config
from attnimg.cli import as_json
from attnimg.cli.proofs import kernel_content, parts_of, proven_plan
from attnimg.cli.running import attention_check_of
from attnimg.cli.subject import (
    base_model_findings,
    distributions,
    gpu_text,
    machine_notes,
    model_file,
    precision_notes,
    problem_of,
    read_model,
    run_findings,
)
from attnimg.config.schema import Checked, Config
from attnimg.context import context_of, described
from attnimg.errors import AttnimgError, printable
from attnimg.facts import Backend, LayerGroup, Machine, Plan, Problem, Proof, Reason
from attnimg.machine import probe
from attnimg.machine.kernel_cache import use_shipped_kernels
from attnimg.select import plan
from attnimg.select.attention_shapes import attention_dropout
from attnimg.select.attention_shapes import read_model as shapes_of
from attnimg.select.model_config import read_config
from attnimg.train.distributed import agree, rank, require_group
from attnimg.train.receipt import versions
from attnimg.train.signals import StopFlag, Stopped, stop_signals

if TYPE_CHECKING:
    from rich.console import Console

    from attnimg.train.checkpoint import ResumePoint
    from attnimg.verify.isolation import IsolationProof

# A plan that fails on these alone lacks a kernel; any other reason lies in the config.
_KERNEL_MISSING = frozenset({"not-installed", "version-low", "fp8-torchao", "fp8-needs-fa3"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What every part of one `train` command needs."""

    config: Config
    machine: Machine
    problem: Problem
    console: Console
    stop: StopFlag

    def say(self, text: str) -> None:
        """Print a progress line to stderr."""
        self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def train(
    file: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys to set, such as learning_rate=1e-4."),
    ] = None,
) -> None:
    """Train: choose the attention backend, say why, prove that packing is safe, then run."""
    from attnimg.cli import as_text

    require_group()
    console = as_text.console(sys.stderr)
    console.quiet = rank() != 0
    try:
        with stop_signals() as stop:
            _train(file, tuple(settings or ()), console=console, stop=stop)
    except Stopped as stopped:
        kept = "nothing was trained yet"
        if stopped.checkpoint is not None:
            kept = f"saved {stopped.checkpoint}; go on with resume_from_checkpoint=true"
        console.print(f"attnimg: {stopped}; {kept}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(stopped.exit_code) from None


def _train(file: str, settings: tuple[str, ...], *, console: Console, stop: StopFlag) -> None:
    from attnimg.train.check import check_inputs
    from attnimg.train.data import check_sources
    from attnimg.train.manifest import hash_of
    from attnimg.train.without_effect import without_effect

    checked = config.check_file(file, overrides=settings)
    machine = probe.this_machine(distributions())
    use_shipped_kernels(machine)
    notes = machine_notes(machine)
    if checked.config is not None:
        notes += precision_notes(checked.config, machine)
    checked = replace(checked, warnings=(*checked.warnings, *notes))
    values = _valid(checked, console=console)
    for note in without_effect(values):
        console.print(f"  warning: {note}", highlight=False, markup=False, soft_wrap=True)
    if (path := model_file(values)) is not None:
        _require_base_model(values, read_config(path), machine, console=console)
    model, dropout = read_model(values)
    session = Session(
        config=values,
        machine=machine,
        problem=problem_of(values, model=model, dropout=dropout, arch=machine.arch),
        console=console,
        stop=stop,
    )
    chosen = _planned(session)
    resume = check_inputs(values, machine)
    check_sources(values)
    checkpoint = (resume.path.name, hash_of(resume.path)) if resume and resume.path else None
    _agree(session, {**values.model_dump(), "plan": as_json.plan_json(chosen),
                     "packages": versions(), "checkpoint": checkpoint})  # fmt: skip
    _run(session, chosen, resume=resume)


def _valid(checked: Checked, *, console: Console) -> Config:
    """Print what is wrong with the config and stop, or print its warnings and go on."""
    from attnimg.cli import as_text

    as_text.print_findings(checked, err=console)
    if checked.config is None or not checked.ok:
        raise typer.Exit(2)
    return checked.config


def _require_base_model(
    values: Config, raw: Mapping[str, Any], machine: Machine, *, console: Console
) -> None:
    """Print the warnings on the base model, and raise the first error."""
    from attnimg.cli import as_text

    errors, warnings = base_model_findings(values, raw, machine)
    if errors:
        raise errors[0]
    as_text.print_warnings(warnings, err=console)


def _planned(session: Session) -> Plan:
    asked = session.config.attn_implementation
    found = plan.choose(asked, session.machine, session.problem, strict=session.config.attn_strict)
    return _shown(found, session)


def _shown(found: Plan, session: Session) -> Plan:
    """Print a plan; one that chose nothing ends the run, with all its reasons."""
    from attnimg.cli import as_text

    if found.chosen is None:
        raise _refusal(found)
    as_text.print_plan(found, gpu=gpu_text(session.machine), out=session.console)
    errors, warnings = run_findings(found, session.problem, session.machine)
    for error in errors:
        raise AttnimgError(error.what, why=error.why, do=error.do, code=error.code, key=error.key)
    as_text.print_warnings(warnings, err=session.console)
    return found


def _refusal(found: Plan) -> AttnimgError:
    asked = next((v for v in found.verdicts if v.backend.name == found.asked), None)
    against = asked.reasons if asked else ()
    why = [f"{reason.code}: {reason.text}" for reason in against] or [found.because]
    missing = bool(against) and {reason.code for reason in against} <= _KERNEL_MISSING
    return AttnimgError(
        f"{found.asked} cannot be used here" if asked else "no attention backend fits",
        why="\n".join(why),
        do=found.do,
        code=against[0].code if against else "not-built",
        key="attn_implementation",
        exit_code=1 if missing else 2,
    )


def _run(session: Session, found: Plan, *, resume: ResumePoint | None) -> None:
    """Load, prove and train; everything heavy is imported from here on.

    What the run registers with transformers is gone after it: others may share the process.
    """
    from attnimg.train.quiet import silence_libraries

    silence_libraries()
    with apply.restored():
        _load_and_fit(session, found, resume=resume)


def _load_and_fit(session: Session, found: Plan, *, resume: ResumePoint | None) -> None:
    from attnimg.train.model import load_model_config
    from attnimg.train.options import try_options

    try_options(session.config)
    model_config = load_model_config(session.config)
    if session.problem.model is None:
        session, found = _replanned(session, model_config)
    session, found = _for_class(session, found, model_config)
    found, proofs = _computes_right(session, found)
    _agree(session, {"plan": as_json.plan_json(found), "kernels": _kernels(session, found)})
    fit_planned(session, found, proofs=proofs, resume=resume)


def fit_planned(
    session: Session, found: Plan, *, proofs: list[Proof], resume: ResumePoint | None
) -> None:
    """Load the model, prove that its packed documents are isolated, and train.

    Args:
        session: the command's.
        found: a plan whose kernels passed their proofs.
        proofs: the proofs of those kernels, for the receipt.
        resume: the checkpoint to resume from; None for a new run.
    """
    from attnimg.train.adapter import adapter_notes
    from attnimg.train.data import load_documents, sample_text, sentence
    from attnimg.train.fit import fit
    from attnimg.train.identity import attention_and_precision, data_of
    from attnimg.train.model import load_model
    from attnimg.train.model_hashes import model_of, tokenizer_of
    from attnimg.train.new_tokens import require_embeddings
    from attnimg.train.resume import require_same
    from attnimg.train.run import RunFacts
    from attnimg.train.tokenizer import load_tokenizer

    values = session.config
    implementation = _prepared(session, found)
    tokenizer = load_tokenizer(values, say=session.say)
    documents = load_documents(values, tokenizer)
    for figures in documents.figures:
        session.say(sentence(figures))
    for warning in documents.warnings:
        session.say(f"warning: {warning}")
    lengths = [len(documents.train), len(documents.validation or ())]
    if lengths[1]:
        session.say(f"{lengths[0]:,} documents to train on, {lengths[1]:,} to evaluate")
    content = [figures.content for figures in documents.figures]
    _agree(session, {"documents": lengths, "data": content})
    session.say(sample_text(documents, tokenizer))
    backend = _backend(found)
    context = context_of(session.problem, backend)
    computed = attention_and_precision(backend.name, context)
    data = data_of(values, documents.figures, tokenizer)
    require_same({**data, **computed, "tokenizer": tokenizer_of(values)}, values, resume)
    require_embeddings(values, (documents.train, documents.validation), tokenizer)
    session.say(f"run: {described(context)}")
    model = load_model(
        values,
        tokenizer=tokenizer,
        implementation=implementation,
        context=context,
        needs_dtype_cast=backend.needs_dtype_cast,
        say=session.say,
    )
    # A folder of this name, or a hub's snapshot, may have other content on another machine.
    _agree(session, {"base_model": model_of(values)})
    for note in adapter_notes(model, values):
        session.say(f"warning: {note}")
    apply.require_applied(model, backend)
    found, proof = _proven(session, found, model)
    context = context_of(session.problem, _backend(found))
    result = fit(
        values,
        model=model,
        tokenizer=tokenizer,
        documents=documents,
        run=RunFacts(
            machine=session.machine,
            plan=found,
            implementation=apply.running(model),
            context=context,
            isolation=asdict(proof) if proof else None,
            proofs=tuple(proofs),
            kernels=_kernels(session, found),
        ),
        resume=resume,
        stop=session.stop,
        console=session.console,
        attention_check=attention_check_of(
            values.attn_check_steps,
            found,
            context,
            dropout=session.problem.dropout,
            say=session.say,
        ),
    )
    for note in result.notes:
        session.say(note)
    for path in result.files if rank() == 0 else ():
        # Scripts get the path unchanged; a terminal must not interpret its control characters.
        typer.echo(printable(str(path)) if sys.stdout.isatty() else path)


def _agree(session: Session, facts: Mapping[str, object]) -> None:
    """Raise unless every process of the group found the same."""
    on_cpu = session.machine.arch.vendor == "cpu"
    agree(facts, cpu=on_cpu, timeout_s=session.config.ddp_timeout)


def _kernels(session: Session, found: Plan) -> dict[str, dict[str, str] | None]:
    """Return hashes of the files that compute each of a plan's backends."""
    return {
        backend.name: kernel_content(backend, machine=session.machine, trusted=part.trusted)
        for backend, part in parts_of(found, session.problem)
    }


def _replanned(session: Session, model_config: Any) -> tuple[Session, Plan]:
    """Plan again for a hub model, whose config.json was not on this machine until now."""
    raw = model_config.to_dict()
    _require_base_model(session.config, raw, session.machine, console=session.console)
    task = problem_of(
        session.config,
        model=shapes_of(raw),
        dropout=attention_dropout(raw),
        arch=session.machine.arch,
    )
    session = replace(session, problem=task)
    return session, _planned(session)


def _for_class(session: Session, found: Plan, model_config: Any) -> tuple[Session, Plan]:
    """Plan again where the model's class takes other attention than the table says of its type."""
    model_class = apply.class_of(model_config)
    facts = apply.facts_of(model_class) if model_class is not None else None
    if facts == session.problem.model_class:
        return session, found
    session = replace(session, problem=replace(session.problem, model_class=facts))
    return session, _planned(session)


def _computes_right(session: Session, found: Plan) -> tuple[Plan, list[Proof]]:
    """Compare the kernels with plain attention; auto goes on to its next candidate."""
    return proven_plan(
        found,
        session.problem,
        machine=session.machine,
        say=session.say,
        shown=lambda following: _shown(following, session),
    )


def _proven(session: Session, found: Plan, model: Any) -> tuple[Plan, IsolationProof | None]:
    """Show the real model packed documents; on a leak, auto goes on to its next candidate."""
    if not session.problem.packing:
        return found, None
    from attnimg.verify.isolation import check_isolation, require_isolation

    while True:
        backend = _backend(found)
        context = context_of(session.problem, backend)
        proof = check_isolation(model, implementation=backend.name, context=context)
        if proof.isolated:
            session.say(f"packing: isolated on {backend.name} ({proof.why})")
            return found, proof
        reason = Reason(code=proof.code or "packing-not-isolated", text=proof.why)
        following = plan.without(found, backend.name, reason)
        if following.chosen is None:
            require_isolation(proof)
        following, _ = _computes_right(session, following)
        session.say(f"packing: {backend.name} is not used ({reason.code}): {proof.why}")
        try:
            apply.switch(
                model,
                _backend(following),
                layers=_layers(session),
                trusted=session.problem.trusted,
            )
        except AttnimgError:  # a model off transformers' attention interface keeps what it has
            require_isolation(proof)
        found = _shown(following, session)


def _backend(found: Plan) -> Backend:
    """Return the backend that a plan chose; a plan without one ended the run before."""
    return apply.backend_of(found)


def _prepared(session: Session, found: Plan) -> str:
    """Load the kernel before anything else is, and give transformers' name of it."""
    layers, trusted = _layers(session), session.problem.trusted
    return apply.prepare(_backend(found), layers=layers, trusted=trusted)


def _layers(session: Session) -> tuple[LayerGroup, ...]:
    model = session.problem.model
    return model.layers if model else ()

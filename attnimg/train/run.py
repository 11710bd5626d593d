"""Train a run from its config: check, select, load, verify, train.

select a backend -> check inputs -> model config -> tokenizer, documents -> verify -> model -> fit
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attnimg import application
from attnimg.config import check_values
from attnimg.config.schema import Config, dataset_entries, has_reference
from attnimg.context import describe_context
from attnimg.errors import AttnimgError, counted, set_backend
from attnimg.facts import Finding, Machine
from attnimg.files import read_regular
from attnimg.memory.report import memory_line, memory_warning, report_memory
from attnimg.pipeline import Report, Selected, kernel_hashes, select, select_verify_apply
from attnimg.run_facts import LayersTask, Plan
from attnimg.selection.model_config import missing_folder
from attnimg.selection.plan import plan_dict
from attnimg.task import Task, build_task, model_file, read_model_config
from attnimg.train.base_model import count_stored_weights, judge_base_model
from attnimg.train.distributed import StopFlag, rank, require_same_on_all_ranks, world_size
from attnimg.train.environment import require_agreement
from attnimg.train.records import FitResult, RunFacts, package_versions

if TYPE_CHECKING:
    from rich.console import Console

    from attnimg.train.checkpoint import ResumePoint
    from attnimg.train.data import Documents

# Limit of the files that a config names; chat templates are the longest.
_FILE_BYTES = 1 << 20


class TrainReport(Report, Protocol):
    """The interface to which a training run reports."""

    @property
    def console(self) -> Console:
        """The console of the progress bar."""

    def warn(self, warnings: Sequence[Finding]) -> None:
        """Print warnings."""


def train(config: Config, machine: Machine, *, report: TrainReport, stop: StopFlag) -> FitResult:
    """Train a run; heavy packages are imported after the checks that do not need them.

    What the run registers with transformers is removed at its end, for other code in the process.

    Raises:
        AttnimgError: the run is refused (exit code 2) or failed (1).
        Stopped: a stop was requested.
    """
    from attnimg.train.check import check_inputs
    from attnimg.train.data import find_sources
    from attnimg.train.environment import silence_libraries
    from attnimg.train.intact import read_checkpoint_hash
    from attnimg.train.saved_adapter import with_saved_adapter
    from attnimg.train.trackers import require_hub, require_trackers

    config = with_saved_adapter(config)
    task = read_checked_task(config, machine, report)
    on_cpu = machine.arch.vendor == "cpu"
    require_agreement(os.environ, config, task.problem, cpu=on_cpu)
    plan = select(task, report)
    resume = check_inputs(config, machine)
    find_sources(config)
    checkpoint = (
        (resume.path.name, read_checkpoint_hash(resume.path)) if resume and resume.path else None
    )
    facts = {
        "plan": _comparable_plan(plan),
        "packages": package_versions(),
        "checkpoint": checkpoint,
    }
    _require_same(config, machine, {**config.model_dump(), **_hash_config_files(config), **facts})
    silence_libraries()
    if rank() == 0:
        require_trackers(config)
        require_hub(config)
    with application.restore_registries(), _exits_as_errors():
        task, plan = with_model_config(config, task, plan, report)
        _forecast_memory(config, task, plan, report)
        return fit_selected(config, task, plan, report=report, stop=stop, resume=resume)


@contextmanager
def _exits_as_errors() -> Iterator[None]:
    """Raise where foreign code calls sys.exit(): with 0, the run would seem to have succeeded."""
    try:
        yield
    except SystemExit as error:
        raise AttnimgError(
            "code that the run loaded ended it",
            why=f"found SystemExit({error.code!r:.60}) from a kernel, a model or a package",
            do=set_backend("eager"),
            code="exited",
            exit_code=1,
        ) from error


def read_checked_task(config: Config, machine: Machine, report: TrainReport) -> Task:
    """Return the task of a run, after checking its base model by the files on this machine.

    Raises:
        AttnimgError: there is no such folder, or the run can't use the model.
    """
    path = model_file(config)
    if path is None and (missing := missing_folder(config.base_model or "")) is not None:
        raise missing
    raw = read_model_config(config, path) if path is not None else None
    if raw is not None:
        _require_base_model(config, raw, machine, report)
    return build_task(config, raw, machine)


def with_model_config(
    config: Config, task: Task, plan: Plan, report: TrainReport
) -> tuple[Task, Plan]:
    """Select again if config.json from the hub, or the model's class, has more information.

    A config that model_config changes is read again as well, since transformers' defaults may
    depend on the changed fields.
    """
    from attnimg.train.arguments import try_options
    from attnimg.train.model import load_model_config

    try_options(config)
    model_config = load_model_config(config)
    found = task
    if task.problem.model is None or config.overrides_of_model_config:
        raw = model_config.to_dict()
        _require_base_model(config, raw, task.machine, report)
        found = build_task(config, raw, task.machine)
    model_class = application.find_model_class(model_config)
    facts = application.read_class_limits(model_class) if model_class is not None else None
    if facts != found.problem.model_class:
        found = replace(found, problem=replace(found.problem, model_class=facts))
    if found == task:
        return task, plan
    before, after = _comparable_plan(plan), _comparable_plan(found.choose())
    if any(before[part] != after[part] for part in ("chosen", "groups")):
        report.log("selects again: the model's configuration and class have more information")
    return found, select(found, report)


def _forecast_memory(config: Config, task: Task, plan: Plan, report: TrainReport) -> None:
    """Report whether the run fits into the memory of its device; warn if it does not."""
    if (path := model_file(config)) is None:
        return

    def accepts(changes: Mapping[str, Any]) -> bool:
        values = {**config.model_dump(exclude_unset=True), **changes}
        return check_values(values, file="config", on=task.machine.arch).ok

    found = report_memory(
        config,
        read_model_config(config, path),
        problem=task.problem,
        plan=plan,
        machine=task.machine,
        is_valid=accepts,
        stored_weights=count_stored_weights(config),
        processes=world_size(),
    )
    report.log(memory_line(found))
    if (warning := memory_warning(found)) is not None:
        report.warn((warning,))


def fit_selected(
    config: Config,
    task: Task,
    plan: Plan,
    *,
    report: TrainReport,
    stop: StopFlag,
    resume: ResumePoint | None,
) -> FitResult:
    """Verify and apply a plan, and train with it.

    Args:
        config: the validated run.
        task: the task that the plan was selected for.
        plan: a plan with a selected backend.
        report: the interface for progress.
        stop: whether a stop was requested.
        resume: the checkpoint to resume from; None for a new run.
    """
    from attnimg.train.attention_check import build_attention_check
    from attnimg.train.fit import fit
    from attnimg.train.hub_layers import kernel_record, list_hub_tasks, replace_by_hub_layers
    from attnimg.train.layers import list_tasks, prove_run, replace_proven_layers
    from attnimg.train.model import load_without_weights
    from attnimg.train.preferences.reference import load_reference, needs_reference
    from attnimg.train.tokenizer import load_tokenizer

    build = cache(partial(load_without_weights, config))
    tasks = list_tasks(config, task.problem, task.machine, build=build)
    ops = [found.op for found in tasks if isinstance(found, LayersTask)]
    of_hub = list_hub_tasks(config, task.problem, task.machine, build=build, log=report.log)
    hubs = [found.hub for found in of_hub if found.hub is not None]
    layer_kernels = {f"{hub.repo}:{hub.layer}": kernel_record(hub) for hub in hubs}
    if config.use_kernels:
        _require_same(config, task.machine, {"kernels of use_kernels": layer_kernels})
    # Before the proofs, so that a mistake in the data is reported without waiting for them.
    tokenizer = load_tokenizer(config, log=report.log)
    documents = _load_documents(config, task.machine, tokenizer, report)
    inputs: dict[str, Any] = {"tokenizer": tokenizer, "documents": documents}
    other_proofs = prove_run(config, [*tasks, *of_hub], machine=task.machine, log=report.log)
    replaced: dict[str, str] = {}
    by_hub: dict[str, dict[str, str]] = {}

    with ExitStack() as undo:

        def replace_layers(model: Any) -> None:
            found, functions = replace_proven_layers(model, ops, log=report.log)
            replaced.update(found)
            for function in functions:
                undo.callback(function)
            device = "cpu" if task.machine.arch.vendor == "cpu" else "cuda"
            by_hub.update(replace_by_hub_layers(model, hubs, device=device, log=report.log))

        def load(selected: Selected) -> Any:
            hashes = kernel_hashes(selected.plan, task)
            _require_same(
                config, task.machine, {"plan": _comparable_plan(selected.plan), "kernels": hashes}
            )
            model = _load_model(
                config, task, selected, tokenizer=tokenizer, documents=documents,
                replace_layers=replace_layers, resume=resume, report=report,
            )  # fmt: skip
            if needs_reference(config):
                inputs["reference"] = load_reference(
                    config,
                    model,
                    tokenizer=tokenizer,
                    implementation=selected.implementation,
                    context=selected.context,
                    needs_dtype_cast=selected.backend.needs_dtype_cast,
                    replace_layers=replace_layers,
                )
                application.require_applied(inputs["reference"], selected.backend)
                report.log("reference: a frozen copy of the model")
            elif has_reference(config):
                kind = "a frozen copy of the adapter"
                if not config.lora_model_dir:
                    kind = "the adapter turned off"
                report.log(f"reference: the model with {kind}")
            return model

        applied = select_verify_apply(task, load, report=report, plan=plan)
        selected = applied.selected
        kernels = kernel_hashes(selected.plan, task)
        # If documents leak on one machine only, that machine selects another backend.
        _require_same(
            config, task.machine, {"plan": _comparable_plan(selected.plan), "kernels": kernels}
        )
        result = fit(
            config,
            model=applied.model,
            **inputs,
            run=RunFacts(
                machine=task.machine,
                plan=selected.plan,
                implementation=application.current_implementation(applied.model),
                context=selected.context,
                isolation=asdict(applied.isolation) if applied.isolation else None,
                proofs=selected.proofs,
                kernels={**kernels, **layer_kernels},
                layers=replaced,
                hub_layers=by_hub,
                other_proofs=other_proofs,
            ),
            resume=resume,
            stop=stop,
            console=report.console,
            attention_check=build_attention_check(
                config.attn_check_steps,
                selected.plan,
                selected.context,
                dropout=task.problem.dropout,
                log=report.log,
            ),
        )
    for note in result.notes:
        report.log(note)
    return result


def _load_documents(
    config: Config, machine: Machine, tokenizer: Any, report: TrainReport
) -> Documents:
    """Load the data, report its statistics, and raise unless all processes have the same data."""
    from attnimg.train.data import load_documents, sample_text, summary_line
    from attnimg.train.model_files import hash_tokenizer
    from attnimg.train.tokenizer import require_embeddings

    documents = load_documents(config, tokenizer)
    for figures in documents.figures:
        report.log(summary_line(figures))
    for warning in documents.warnings:
        report.log(f"warning: {warning}")
    lengths = [len(documents.train), len(documents.validation or ())]
    if lengths[1]:
        unit = documents.figures[0].unit
        report.log(f"{counted(lengths[0], unit)} to train on, {lengths[1]:,} to evaluate")
    require_embeddings(config, (documents.train, documents.validation), tokenizer)
    content = [figures.content for figures in documents.figures]
    _require_same(
        config,
        machine,
        {"tokenizer": hash_tokenizer(config), "documents": lengths, "data": content},
    )
    report.log(sample_text(documents, tokenizer))
    return documents


def _load_model(
    config: Config,
    task: Task,
    selected: Selected,
    *,
    tokenizer: Any,
    documents: Documents,
    replace_layers: Callable[[Any], None],
    resume: ResumePoint | None,
    report: TrainReport,
) -> Any:
    """Load the model, after checking that a resumed run has the identity of its checkpoint."""
    from attnimg.train.lora import adapter_notes
    from attnimg.train.model import load_model
    from attnimg.train.model_files import hash_model, hash_tokenizer
    from attnimg.train.resume import attention_and_precision, data_identity, require_same_identity

    computed = attention_and_precision(selected.backend.name, selected.context)
    data = data_identity(config, documents.figures, tokenizer)
    require_same_identity({**data, **computed, "tokenizer": hash_tokenizer(config)}, config, resume)
    report.log(f"run: {describe_context(selected.context)}")
    model = load_model(
        config,
        tokenizer=tokenizer,
        implementation=selected.implementation,
        context=selected.context,
        needs_dtype_cast=selected.backend.needs_dtype_cast,
        replace_layers=replace_layers,
        log=report.log,
    )
    # The model's folder, or its snapshot of the hub, may have other content on another machine.
    _require_same(config, task.machine, {"base_model": hash_model(config)})
    for note in adapter_notes(model, config):
        report.log(f"warning: {note}")
    return model


def _require_base_model(
    config: Config, raw: Mapping[str, Any], machine: Machine, report: TrainReport
) -> None:
    """Report the warnings on the base model, and raise the first error."""
    errors, warnings = judge_base_model(config, raw, machine)
    if errors:
        raise errors[0]
    report.warn(warnings)


def _comparable_plan(plan: Plan) -> dict[str, Any]:
    """Return a plan without its texts, which may have folder names of one machine."""
    found = plan_dict(plan)
    groups = [{**group, "kernel": None} for group in found["groups"]]
    backend = plan.chosen and plan.chosen.backend.name
    return {"chosen": backend, "groups": groups, "candidates": found["candidates"]}


def _hash_config_files(config: Config) -> dict[str, str]:
    """Return the hash of each file that the config names and that is not compared elsewhere."""
    paths = {"deepspeed": config.deepspeed, "attn_known_bad": config.attn_known_bad,
             "chat_template_jinja": config.chat_template_jinja}  # fmt: skip
    for key, spec, _ in dataset_entries(config):
        paths[f"{key}.chat_template_jinja"] = spec.chat_template_jinja
    found = {}
    for key, path in paths.items():
        with suppress(OSError, ValueError):  # a template may be the text itself
            if isinstance(path, str):
                content = read_regular(Path(path).expanduser(), at_most=_FILE_BYTES)
                found[f"{key} (content)"] = hashlib.sha256(content).hexdigest()
    return found


def _require_same(config: Config, machine: Machine, facts: Mapping[str, object]) -> None:
    """Raise unless all processes of the group have the same facts."""
    require_same_on_all_ranks(facts, cpu=machine.arch.vendor == "cpu", timeout_s=config.ddp_timeout)

"""Train: make rows, build the engine, compare its loss, run it, save the model, write the receipt.

documents -> rows -> engine -> own loss compared -> steps -> final model, loss.png, receipt.json
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnimg.config.schema import Config, trains_preferences
from attnimg.errors import AttnimgError, counted, memory_errors
from attnimg.redact import redact
from attnimg.run_facts import RunContext
from attnimg.train import records
from attnimg.train.arguments import (
    Schedule,
    count_weights,
    plan_steps,
    settings_in_use,
    training_arguments,
    weights_text,
)
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.check import output_dir_lock, prepare_output_dir
from attnimg.train.checkpoint import ResumePoint, read_run_state
from attnimg.train.distributed import (
    StopFlag,
    Stopped,
    join_group,
    lost_rank_errors,
    rank,
    world_size,
)
from attnimg.train.environment import silence_libraries
from attnimg.train.experts import experts_in_use
from attnimg.train.freed_memory import keep_freed_memory
from attnimg.train.intact import find_damage
from attnimg.train.model_files import save_final_model
from attnimg.train.records import (
    FitResult,
    ProgressView,
    RunFacts,
    Status,
    build_receipt,
    print_line,
    write_receipt,
)
from attnimg.train.resume import (
    accepted_changes,
    build_identity,
    read_identity,
    require_same_identity,
    require_steps,
    resume_notes,
)
from attnimg.train.rows import Rows, is_packed, make_rows, pad_rows_to_multiple
from attnimg.train.tokenizer import end_token_notes, use_trained_template
from attnimg.train.trackers import active_trackers

if TYPE_CHECKING:
    from attnimg.train.data import Documents
    from attnimg.train.hub import HubCallback
    from attnimg.train.loss import LossCheck
    from attnimg.train.tracker_callback import CheckpointCallback, TrackerCallback

# Keys of model configs with the number of experts, of which a batch may use only some.
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """The config, model, rows and state of one session of a run.

    Attributes:
        config: the validated run.
        folder: output_dir.
        model: as `load_model` returns it.
        reference: for rl: dpo or kto without an adapter, a frozen copy of the model.
        tokenizer: as `load_tokenizer` returns it.
        run: the results of the steps before training.
        resume: where the run resumes; None for a new run in an empty folder.
        stop: whether a stop was requested.
        console: the console for progress, on stderr.
        train: rows to train on.
        evaluation: rows to evaluate on; None without evaluation.
        schedule: the optimizer steps of the run.
        restored: the run's state in the checkpoint that it resumes from; empty for a new run.
        identity: what determines the run's result (resume.py); saved with each checkpoint.
        attention_check: judges attention calls of training steps.
    """

    config: Config
    folder: Path
    model: Any
    tokenizer: Any
    run: RunFacts
    resume: ResumePoint | None
    stop: StopFlag
    console: Console
    train: Rows
    evaluation: Rows | None
    schedule: Schedule
    restored: Mapping[str, Any]
    identity: Mapping[str, Any]
    attention_check: AttentionCheck
    reference: Any = None

    @property
    def checkpoint(self) -> Path | None:
        """Return the checkpoint that the session resumes from."""
        return self.resume.path if self.resume else None

    @property
    def is_done(self) -> bool:
        """Return whether the checkpoint has all steps of the run."""
        return self.resume is not None and self.resume.step >= self.schedule.total_steps


def fit(
    config: Config,
    *,
    model: Any,
    tokenizer: Any,
    documents: Documents,
    run: RunFacts,
    resume: ResumePoint | None,
    stop: StopFlag,
    console: Console,
    attention_check: AttentionCheck,
    reference: Any = None,
) -> FitResult:
    """Train, and write checkpoints, model, metrics.jsonl, loss.png and receipt.json to output_dir.

    Args:
        config: the validated run.
        model: as `load_model` returns it.
        tokenizer: as `load_tokenizer` returns it.
        documents: training and validation documents, tokenized.
        run: the results of the steps before training.
        resume: as `check_inputs` returns it; None for a new run in an empty folder.
        stop: whether a stop was requested, from `stop_signals`.
        console: the console for progress, on stderr.
        attention_check: judges attention calls of training steps.
        reference: for rl: dpo or kto without an adapter, another copy of the model.

    Raises:
        AttnimgError: the run failed (exit code 1): disk full, out of memory, loss not finite,
            attention kernel wrong; or another run trains in output_dir (output-dir-busy).
        Stopped: a stop was requested; a checkpoint is written.
    """
    silence_libraries()
    on_cpu = run.machine.arch.vendor == "cpu"
    join_group(cpu=on_cpu, timeout_s=config.ddp_timeout)
    folder = Path(config.output_dir).expanduser()
    train, evaluation = _make_rows(config, documents, run=run, tokenizer=tokenizer)
    identity = build_identity(
        config,
        run=run,
        tokenizer=tokenizer,
        figures=documents.figures,
        rows=train.figures["rows"],
        tokens=train.figures["tokens"],
    )
    require_same_identity(identity, config, resume)
    notes = use_trained_template(config, tokenizer)
    for note in (*notes, *end_token_notes(documents.train, tokenizer, model)):
        print_line(console, f"  warning: {note}")
    session = Session(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        run=run,
        resume=resume,
        stop=stop,
        console=console,
        train=train,
        evaluation=evaluation,
        schedule=plan_steps(
            config, rows=len(train.dataset), world=world_size(), validation=evaluation is not None
        ),
        restored=read_run_state(resume.path) if resume and resume.path else {},
        identity=identity,
        attention_check=attention_check,
        reference=reference,
    )
    steps = session.schedule.total_steps
    require_steps(steps, config, resume)
    if config.qat and not config.max_steps and (config.qat.fake_quant_after_n_steps or 0) >= steps:
        first = config.qat.fake_quant_after_n_steps
        text = f"qat has no effect: it begins after {first} steps, and the run has {steps}"
        print_line(console, f"  warning: {text}")
    with output_dir_lock(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            prepare_output_dir(folder, resume, console=console)
        with keep_freed_memory(os.environ, cpu=on_cpu):
            return _run_with_receipt(session, documents.figures)


def _make_rows(
    config: Config, documents: Documents, *, run: RunFacts, tokenizer: Any
) -> tuple[Rows, Rows | None]:
    """Pack both splits, or make each document a row; preference data are never packed."""
    if trains_preferences(config):
        from attnimg.train.preferences.batches import make_preference_rows

        padding, validation = tokenizer.pad_token_id, documents.validation
        return (
            make_preference_rows(documents.train, config, pad_token_id=padding),
            make_preference_rows(validation, config, pad_token_id=padding) if validation else None,
        )

    def rows(dataset: Any, *, packed: bool, batch_size: int) -> Rows:
        padding = tokenizer.pad_token_id
        built = make_rows(dataset, config, packed=packed, context=run.context, pad_token_id=padding)
        multiple = batch_size * world_size() if world_size() > 1 else 1
        return pad_rows_to_multiple(built, multiple=multiple, pad_token_id=padding)

    packed, batch_size = is_packed(config, evaluation=False), config.micro_batch_size
    train = rows(documents.train, packed=packed, batch_size=batch_size)
    if not documents.validation:
        return train, None
    return train, rows(
        documents.validation,
        packed=is_packed(config, evaluation=True),
        batch_size=config.eval_batch_size or batch_size,
    )


def _run_with_receipt(session: Session, data_figures: object) -> FitResult:
    """Train; write the receipt before the first step, and again when the run has ended."""
    train, evaluation, checkpoint = session.train, session.evaluation, session.checkpoint
    first = rank() == 0
    before = read_identity(checkpoint) if checkpoint else {}
    if checkpoint and first:
        for note in resume_notes(before, session.identity, name=checkpoint.name):
            print_line(session.console, note)
    receipt = build_receipt(
        session.config,
        run=session.run,
        figures={
            "world_size": world_size(),
            "identity": session.identity,
            "data": data_figures,
            "packing": {"train": train.figures, "eval": evaluation.figures if evaluation else None},
            "schedule": session.schedule,
            "attention_check": session.attention_check.record,
            "changed_on_resume": {
                change.key: {"before": change.before, "now": change.now}
                for change in accepted_changes(before, session.identity)
            },
        },
        resumed_from=checkpoint,
    )
    if first:
        write_receipt(session.folder, receipt, status="running")
    try:
        with memory_errors(), lost_rank_errors(session.config.ddp_timeout):
            result = _train(session, receipt)
    except BaseException as error:
        if first:
            _write_failure(session.folder, receipt, error=error)
        raise
    if first:
        figures = asdict(result)
        names = ("steps", "loss", "eval_loss", "aux_loss", "tokens", "seconds")
        receipt |= {"metrics": {name: figures[name] for name in names}, "files": result.files}
        receipt |= {"hub": result.hub}
        write_receipt(session.folder, receipt, status="done")
    return result


def _write_failure(folder: Path, receipt: Mapping[str, object], *, error: BaseException) -> None:
    """Write how the run ended, unless the disk is too full even for that."""
    status: Status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    details: dict[str, object] = {"code": type(error).__name__, "what": redact(str(error))}
    if isinstance(error, AttnimgError):
        parts = {"what": error.what, "why": error.why, "do": error.do}
        details = {"code": error.code, **{name: redact(text) for name, text in parts.items()}}
    # The error being raised matters more than a failure to write it to a full disk.
    with suppress(AttnimgError):
        write_receipt(folder, {**receipt, "error": details}, status=status)


def _train(session: Session, receipt: dict[str, object]) -> FitResult:
    """Build the engine, compare its loss with the model's own, train, and write the model."""
    began = time.monotonic()
    first, config = rank() == 0, session.config
    tracker, hub = _destinations(session) if first else (None, None)
    view = ProgressView(session.console, total=session.schedule.total_steps, visible=first)

    def on_ready(engine: Any) -> None:
        receipt["applied"] = settings_in_use(engine, session.run.plan)
        if first:
            write_receipt(session.folder, receipt, status="running")

    engine = build_engine(session, view, on_ready, callbacks=[c for c in (tracker, hub) if c])
    receipt["weights"] = counts = count_weights(engine.model)
    print_line(session.console, f"  {weights_text(counts)}")
    if config.experts_implementation:
        print_line(session.console, f"  experts: {experts_in_use(engine.model)}")
    session.attention_check.report_schedule()
    receipt["loss"] = _check_own_loss(engine, session)
    with ExitStack() as ended:
        for destination in (tracker, hub):
            if destination:
                ended.enter_context(destination.ended())
        try:
            notes = _run_engine(engine, session)
        finally:
            view.end()
        files, steps = save_final_model(engine, config, session.folder), engine.state.global_step
        push_error = hub.push_model(files) if hub else None
        if tracker:
            tracker.add_model(files)
    if first:
        subtitle = (
            f"base model {Path(str(config.base_model)).name}, attention {session.run.backend}, "
            f"{session.run.context.dtype}, {counted(steps, 'step')}"
        )
        picture = records.plot_loss(session.folder, title="Training loss", subtitle=subtitle)
        files += [path for path in (picture, session.folder / records.METRICS_FILE) if path]
    # Everything is written: a later signal has nothing to save.
    session.stop.training = False
    lines = records.read_metrics(session.folder)

    def last(name: str) -> float | None:
        return next((line[name] for line in reversed(lines) if name in line), None)

    return FitResult(
        steps=steps,
        loss=last("loss"),
        eval_loss=last("eval_loss"),
        aux_loss=last("aux_loss"),
        tokens=engine.counter.total_tokens,
        seconds=time.monotonic() - began,
        files=tuple(files),
        resumed_from=session.checkpoint,
        notes=tuple(notes),
        hub=hub.record if hub else None,
        push_error=push_error,
    )


def _destinations(session: Session) -> tuple[TrackerCallback | None, HubCallback | None]:
    """Return what reports to trackers and pushes to the hub, where the config turns them on."""
    config, folder = session.config, session.folder
    tracker: TrackerCallback | None = None
    hub: HubCallback | None = None

    def log(text: str) -> None:
        print_line(session.console, f"  {text}")

    if active_trackers(config):
        from attnimg.train.tracker_callback import TrackerCallback

        tracker = TrackerCallback(config, folder, log=log)
    if config.hub_model_id:
        from attnimg.train.hub import HubCallback

        hub = HubCallback(config, folder, log=log)
    return tracker, hub


def build_engine(
    session: Session,
    view: ProgressView,
    on_ready: Callable[[Any], None],
    *,
    callbacks: Sequence[CheckpointCallback] = (),
) -> Any:
    """Build the engine, without transformers' own printing.

    Args:
        session: config, model, rows and state of the run.
        view: the progress bar.
        on_ready: called with the engine when it is ready for its first step.
        callbacks: those of trackers and the hub.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTConfig

    from attnimg.train.engine import Engine, RunCallback, RunTrainer

    config, run, evaluation = session.config, session.run, session.evaluation
    arguments = training_arguments(
        config,
        machine=run.machine,
        context=run.context,
        schedule=session.schedule,
        sparse=any(getattr(session.model.config, name, None) for name in EXPERT_KEYS),
    )
    patience = config.early_stopping_patience
    options = {
        "model": session.model,
        "data_collator": session.train.collate,
        "train_dataset": session.train.dataset,
        "eval_dataset": evaluation.dataset if evaluation else None,
        "processing_class": session.tokenizer,
        "callbacks": [EarlyStoppingCallback(patience)] if patience else [],
    }
    engine: RunTrainer
    if trains_preferences(config):
        from attnimg.train.preferences.trainer import build_preference_engine

        engine = build_preference_engine(session, arguments, options)
    else:
        engine = Engine(session, args=SFTConfig(**arguments), **options)
    engine.remove_callback(PrinterCallback)
    if config.qat:
        from attnimg.train.qat import QatCallback

        done = session.resume.step if session.resume else 0
        engine.add_callback(QatCallback(session.model, config, done=done))
    for callback in callbacks:  # before RunCallback, which may evaluate when training begins
        callback.attach(engine)
    engine.add_callback(RunCallback(engine, view, on_ready))
    _require_context(engine, run.context, deepspeed=bool(config.deepspeed))
    return engine


def _require_context(engine: Any, context: RunContext, *, deepspeed: bool) -> None:
    """Raise unless the engine calls the model as in its proof: accelerate also reads variables.

    Raises:
        AttnimgError: autocast or torch.compile differ (code context-differs, exit code 1).
    """
    accelerator = engine.accelerator
    named = {"fp16": "float16", "bf16": "bfloat16"}
    # DeepSpeed's own engine casts the weights; accelerate's autocast is off there.
    autocast = named.get(accelerator.mixed_precision) if accelerator.native_amp else None
    compiled = accelerator.state.dynamo_plugin.backend.value != "NO"
    found, needed = (autocast, compiled), (context.autocast, context.compiled)
    if found == needed or deepspeed:
        return
    texts = [f"autocast {cast or 'off'}, torch.compile {'on' if on else 'off'}"
             for cast, on in (found, needed)]  # fmt: skip
    raise AttnimgError(
        "the trainer would call the model differently from its proof",
        why=f"found {texts[0]}\nneeded {texts[1]}",
        do="unset ACCELERATE_MIXED_PRECISION and ACCELERATE_DYNAMO_BACKEND, and set bf16 and "
        "torch_compile in the config",
        code="context-differs",
        exit_code=1,
    )


def _check_own_loss(engine: Any, session: Session) -> LossCheck:
    """Compare the trainer's loss with the model's own, and print the result.

    Raises:
        AttnimgError: the class's loss is not that of its logits (loss-differs), or the model
            raises (model-raised); exit code 1.
    """
    from attnimg.train.loss import LossCheck, loss_check_text
    from attnimg.train.own_loss import check_loss

    config = session.config
    if session.is_done:
        return LossCheck(compared=False, why="no step is left to train")
    if trains_preferences(config):
        from attnimg.train.preferences.log_probs import check_log_probs, log_probs_text

        check = check_log_probs(
            engine,
            session.train,
            context=session.run.context,
            pad_token_id=session.tokenizer.pad_token_id,
        )
        print_line(session.console, f"  {log_probs_text(check)}")
        return check
    sharded = bool(config.fsdp or config.fsdp_config or config.deepspeed)
    check = check_loss(engine, session.train, context=session.run.context, sharded=sharded)
    print_line(session.console, f"  {loss_check_text(check)}")
    return check


def _run_engine(engine: Any, session: Session) -> list[str]:
    """Train to the end, or to an early stop; return notes on how it ended.

    Raises:
        AttnimgError: the GPU's memory is full (out-of-memory, exit code 1).
    """
    import torch
    from transformers import TrainerState

    total, checkpoint = session.schedule.total_steps, session.checkpoint
    loads_best = session.config.load_best_model_at_end
    if checkpoint and session.is_done and session.resume:
        # transformers would train one step too many; only the model has to be loaded.
        engine._load_from_checkpoint(str(checkpoint))
        saved = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        engine.state.best_metric = saved.best_metric
        engine.state.best_global_step = saved.best_global_step
        engine.state.global_step = session.resume.step
        engine.counter.total_tokens = int(session.restored.get("tokens", 0))
        if session.restored.get("evaluate_first"):
            engine.evaluate_missed()
        notes = [f"all {total} steps were done already at {checkpoint}"]
        return [*notes, _load_best(engine, "the run is complete")] if loads_best else notes
    try:
        engine.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise AttnimgError(
            f"out of GPU memory at step {engine.state.global_step + 1}",
            why=str(error).splitlines()[0],
            do="halve micro_batch_size and double gradient_accumulation_steps (the same losses), "
            "set gradient_checkpointing: true, or adapter: lora",
            code="out-of-memory",
            key="micro_batch_size",
            exit_code=1,
        ) from error
    if engine.state.global_step < total:
        return [_load_best(engine, f"stopped early at step {engine.state.global_step}")]
    return [_load_best(engine, "the run is complete")] if loads_best else []


def _load_best(engine: Any, ended: str) -> str:
    """Load the best checkpoint, if there is one; return a note on which model is saved.

    Args:
        engine: the engine, after training.
        ended: how the run ended, for the note.
    """
    best = engine.folder / f"checkpoint-{engine.state.best_global_step}"
    if engine.state.best_global_step == engine.state.global_step:
        return f"{ended}: the evaluation loss is the lowest; the model is that of the last step"
    reason = f"{ended}: the evaluation loss is no better"
    if not best.is_dir():
        return f"{reason}; the model is that of the last step"
    if wrong := find_damage(best):
        return (
            f"warning: {reason} than at step {engine.state.best_global_step}, but {best.name} is "
            f"damaged ({wrong[0]}); the model is that of the last step"
        )
    engine._load_from_checkpoint(str(best))
    return f"{reason} than at step {engine.state.best_global_step}; the model is {best.name}"

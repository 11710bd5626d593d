"""Run the training: rows, engine, final model, plot, receipt."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError, memory_errors
from attnimg.facts import RunContext
from attnimg.train import metrics
from attnimg.train.arguments import Schedule, plan_steps, training_arguments
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.checkpoint import ResumePoint, read_state
from attnimg.train.distributed import (
    StopFlag,
    Stopped,
    join,
    lost_rank_errors,
    rank,
    world_size,
)
from attnimg.train.environment import silence_libraries
from attnimg.train.identity import identity_of
from attnimg.train.intact import damages_of
from attnimg.train.loss import LossCheck, loss_sentence
from attnimg.train.metrics import ProgressView, draw_loss
from attnimg.train.model_files import save_final
from attnimg.train.output_dir import locked, prepare_output_dir
from attnimg.train.receipt import (
    FitResult,
    RunFacts,
    Status,
    applied,
    count_weights,
    open_receipt,
    sentence,
    write_receipt,
)
from attnimg.train.resume import (
    accepted_changes,
    identity_in,
    require_same,
    require_steps,
    resume_notes,
)
from attnimg.train.rows import Rows, even_out, make_rows
from attnimg.train.tokenizer import stop_notes, use_trained_template

if TYPE_CHECKING:
    from attnimg.train.data.documents import Documents


# How model configs count experts, of which a batch may use only some.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What one session of a run works with.

    Attributes:
        config: the validated run.
        folder: output_dir.
        model: what `load_model` gave.
        tokenizer: what `load_tokenizer` gave.
        run: what the steps before training found out.
        resume: where the run goes on; None for a new run in an empty folder.
        stop: whether someone asked to stop.
        console: where progress goes, stderr's.
        train: rows to train on.
        evaluation: rows to evaluate on; None without.
        schedule: the run counted in steps.
        restored: the run's own state in the checkpoint it goes on from; empty for a new run.
        identity: what determines the run's result (identity.py); saved with each checkpoint.
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
) -> FitResult:
    """Train, and leave in output_dir: checkpoints, the model, metrics, a plot, a receipt.

    Args:
        config: the validated run.
        model: what `load_model` gave.
        tokenizer: what `load_tokenizer` gave.
        documents: training and validation documents, tokenized.
        run: what the steps before found out.
        resume: what `check_inputs` found; None for a new run in an empty folder.
        stop: whether someone asked to stop, from `stop_signals`.
        console: where progress goes, stderr's.
        attention_check: judges attention calls of training steps.

    Raises:
        AttnimgError: the run failed (exit code 1): disk full, out of memory, loss not finite,
            attention kernel wrong; or another run trains in output_dir (output-dir-busy).
        Stopped: someone asked to stop; a checkpoint is written.
    """
    silence_libraries()
    join(cpu=run.machine.arch.vendor == "cpu", timeout_s=config.ddp_timeout)
    folder = Path(config.output_dir).expanduser()
    train, evaluation = _rows(config, documents, run=run, tokenizer=tokenizer)
    identity = identity_of(
        config,
        run=run,
        tokenizer=tokenizer,
        figures=documents.figures,
        rows=train.figures["rows"],
        tokens=train.figures["tokens"],
    )
    require_same(identity, config, resume)
    notes = use_trained_template(config, tokenizer)
    for note in (*notes, *stop_notes(documents.train, tokenizer, model)):
        console.print(f"  warning: {note}", highlight=False, markup=False, soft_wrap=True)
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
        restored=read_state(resume.path) if resume and resume.path else {},
        identity=identity,
        attention_check=attention_check,
    )
    require_steps(session.schedule.total_steps, config, resume)
    with locked(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            prepare_output_dir(folder, resume, console=console)
        return _with_receipt(session, documents.figures)


def _with_receipt(session: Session, data_figures: object) -> FitResult:
    """Train with a receipt on the disk from before the first step to after the last word."""
    train, evaluation = session.train, session.evaluation
    point = session.resume.path if session.resume else None
    before = identity_in(point) if point else {}
    if point and rank() == 0:
        for note in resume_notes(before, session.identity, name=point.name):
            session.console.print(note, highlight=False, markup=False, soft_wrap=True)
    receipt = open_receipt(
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
        resumed_from=point,
    )
    first = rank() == 0
    if first:
        write_receipt(session.folder, receipt, status="running")
    try:
        with memory_errors(), lost_rank_errors(session.config.ddp_timeout):
            result = _train(session, receipt)
    except BaseException as error:
        if first:
            _write_end(session.folder, receipt, error=error)
        raise
    if first:
        figures = asdict(result)
        names = ("steps", "loss", "eval_loss", "aux_loss", "tokens", "seconds")
        receipt |= {"metrics": {name: figures[name] for name in names}, "files": result.files}
        write_receipt(session.folder, receipt, status="done")
    return result


def _rows(
    config: Config, documents: Documents, *, run: RunFacts, tokenizer: Any
) -> tuple[Rows, Rows | None]:
    """Pack both splits; evaluation is packed as training is, unless eval_sample_packing is false.

    Without sample_packing nothing is packed: no proof shows that the model keeps documents apart.
    """
    packed = bool(config.sample_packing)
    eval_packed = packed and config.eval_sample_packing is not False

    def rows(dataset: Any, *, packed: bool) -> Rows:
        return make_rows(
            dataset, config, packed=packed, context=run.context, pad_token_id=tokenizer.pad_token_id
        )

    def shared_out(made: Rows, *, batch_size: int) -> Rows:
        at_once = batch_size * world_size() if world_size() > 1 else 1
        return even_out(made, multiple=at_once, pad_token_id=tokenizer.pad_token_id)

    train = shared_out(rows(documents.train, packed=packed), batch_size=config.micro_batch_size)
    if documents.validation is None or not len(documents.validation):
        return train, None
    evaluation = shared_out(
        rows(documents.validation, packed=eval_packed),
        batch_size=config.eval_batch_size or config.micro_batch_size,
    )
    return train, evaluation


def _train(session: Session, receipt: dict[str, object]) -> FitResult:
    """Build the engine, compare its loss with the model's own, train, and write the model."""
    began = time.monotonic()
    first = rank() == 0
    view = ProgressView(session.console, total=session.schedule.total_steps, visible=first)

    def ready(engine: Any) -> None:
        receipt["applied"] = applied(engine, session.run.plan)
        if first:
            write_receipt(session.folder, receipt, status="running")

    engine = build_engine(session, view, ready)
    counts = count_weights(engine.model)
    receipt["weights"] = counts
    session.console.print(f"  {sentence(counts)}", highlight=False, markup=False, soft_wrap=True)
    session.attention_check.announce()
    receipt["loss"] = check_own_loss(engine, session)
    try:
        notes = run_engine(engine, session)
    finally:
        view.end()
    files = save_final(engine, session.config, session.folder)
    if first:
        files += _draw(session, steps=engine.state.global_step)
    # All is written: a signal from here on has nothing left to save.
    session.stop.training = False
    lines = metrics.read(session.folder)
    return FitResult(
        steps=engine.state.global_step,
        loss=next((line["loss"] for line in reversed(lines) if "loss" in line), None),
        eval_loss=next((x["eval_loss"] for x in reversed(lines) if "eval_loss" in x), None),
        aux_loss=next((line["aux_loss"] for line in reversed(lines) if "aux_loss" in line), None),
        tokens=engine.meter.total_tokens,
        seconds=time.monotonic() - began,
        files=tuple(files),
        resumed_from=session.resume.path if session.resume else None,
        notes=tuple(notes),
    )


def _draw(session: Session, *, steps: int) -> list[Path]:
    """Draw the losses; name the files about them."""
    picture = draw_loss(
        session.folder,
        title=Path(str(session.config.base_model)).name,
        subtitle=f"attention {session.run.backend}, {session.run.context.dtype}, {steps:,} steps",
    )
    return [path for path in (picture, session.folder / metrics.FILE) if path]


def _write_end(folder: Path, receipt: Mapping[str, object], *, error: BaseException) -> None:
    """Write how the run ended, unless the disk is too full even for that."""
    status: Status = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    told: dict[str, object] = {"code": type(error).__name__, "what": str(error)}
    if isinstance(error, AttnimgError):
        told = {"code": error.code, "what": error.what, "why": error.why, "do": error.do}
    # The error on its way to the user matters more than its copy on a full disk.
    with suppress(AttnimgError):
        write_receipt(folder, {**receipt, "error": told}, status=status)


def build_engine(session: Session, view: ProgressView, ready: Callable[[Any], None]) -> Any:
    """Put the engine together; transformers' own printing is taken out.

    Args:
        session: what it works with.
        view: the bar.
        ready: called with the engine when it is ready for its first step.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTConfig

    from attnimg.train.engine import Engine, Watch

    config, run, train, evaluation = session.config, session.run, session.train, session.evaluation
    arguments = training_arguments(
        config,
        machine=run.machine,
        context=run.context,
        schedule=session.schedule,
        sparse=any(getattr(session.model.config, name, None) for name in EXPERTS),
    )
    watch = Watch(
        session.folder,
        stop=session.stop,
        view=view,
        restored=session.restored,
        config=config if session.resume and session.resume.path else None,
        ready=ready,
    )
    patience = config.early_stopping_patience
    engine = Engine(
        session.folder,
        stop=session.stop,
        backend=run.backend,
        save_limit=config.save_total_limit,
        identity=session.identity,
        eval_collate=(evaluation or train).collate,
        attention_check=session.attention_check,
        added_rows=train.added,
        model=session.model,
        args=SFTConfig(**arguments),
        data_collator=train.collate,
        train_dataset=train.dataset,
        eval_dataset=evaluation.dataset if evaluation else None,
        processing_class=session.tokenizer,
        callbacks=[*([EarlyStoppingCallback(patience)] if patience else []), watch],
    )
    engine.remove_callback(PrinterCallback)
    watch.engine = engine
    _require_context(engine, run.context, deepspeed=bool(config.deepspeed))
    return engine


def _require_context(engine: Any, context: RunContext, *, deepspeed: bool) -> None:
    """Raise unless the engine calls the model as it was proven: accelerate also reads variables.

    Raises:
        AttnimgError: autocast or torch.compile differ (code context-differs, exit code 1).
    """
    accelerator = engine.accelerator
    named = {"fp16": "float16", "bf16": "bfloat16"}
    # DeepSpeed's own engine casts the weights; accelerate's autocast is off there.
    cast = named.get(accelerator.mixed_precision) if accelerator.native_amp else None
    compiled = accelerator.state.dynamo_plugin.backend.value != "NO"
    found, needed = (cast, compiled), (context.autocast, context.compiled)
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


def check_own_loss(engine: Any, session: Session) -> LossCheck:
    """Compare the trainer's loss with the model's own, and print the result.

    Raises:
        AttnimgError: the class's loss is not that of its logits (loss-differs), or the model
            raises (model-raised); exit code 1.
    """
    from attnimg.train.own_loss import check_loss

    config = session.config
    if session.resume and session.resume.step >= session.schedule.total_steps:
        return LossCheck(compared=False, why="no step is left to train")
    found = check_loss(
        engine,
        session.train,
        context=session.run.context,
        sharded=bool(config.fsdp or config.fsdp_config or config.deepspeed),
    )
    session.console.print(
        f"  {loss_sentence(found)}", highlight=False, markup=False, soft_wrap=True
    )
    return found


def run_engine(engine: Any, session: Session) -> list[str]:
    """Train to the end, or to an early stop; give the notes of how it ended.

    Raises:
        AttnimgError: the GPU's memory is full (out-of-memory), or another process has ended or
            does not answer (rank-lost); exit code 1.
    """
    import torch

    total = session.schedule.total_steps
    point = session.resume.path if session.resume else None
    if point and session.resume and session.resume.step >= total:
        # transformers would train one step more than asked: only the model is missing.
        engine._load_from_checkpoint(str(point))
        engine.state.global_step = session.resume.step
        engine.meter.total_tokens = int(session.restored.get("tokens", 0))
        if session.restored.get("evaluate_first"):
            engine.evaluate_missed()
        return [f"all {total} steps were done already at {point}"]
    try:
        with lost_rank_errors(session.config.ddp_timeout):
            engine.train(resume_from_checkpoint=str(point) if point else None)
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
    if engine.state.global_step >= total:
        return []
    return [_end_early(engine)]


def _end_early(engine: Any) -> str:
    """Go back to the best checkpoint if there is one; say which model is kept."""
    best = engine.folder / f"checkpoint-{engine.state.best_global_step}"
    reason = f"stopped early at step {engine.state.global_step}: the evaluation loss is no better"
    if not best.is_dir():
        return f"{reason}; the model is that of the last step"
    if wrong := damages_of(best):
        return (
            f"warning: {reason} than at step {engine.state.best_global_step}, but {best.name} is "
            f"damaged ({wrong[0]}); the model is that of the last step"
        )
    engine._load_from_checkpoint(str(best))
    return f"{reason} than at step {engine.state.best_global_step}; the model is {best.name}"

"""One session of the engine: put together, run to the end, told how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import RunContext
from attnimg.train.arguments import training_arguments
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.checkpoint import ResumePoint
from attnimg.train.distributed import lost_rank_errors
from attnimg.train.intact import damages_of
from attnimg.train.loss_facts import LossCheck, sentence
from attnimg.train.progress import ProgressView
from attnimg.train.rows import Rows
from attnimg.train.run_facts import RunFacts
from attnimg.train.schedule import Schedule
from attnimg.train.signals import StopFlag

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


def build_engine(session: Session, view: ProgressView, ready: Callable[[Any], None]) -> Any:
    """Put the engine together; transformers' own printing is taken out.

    Args:
        session: what it works with.
        view: the bar.
        ready: called with the engine when it is ready for its first step.
    """
    from transformers import EarlyStoppingCallback, PrinterCallback
    from trl import SFTConfig

    from attnimg.train.engine import Engine
    from attnimg.train.watch import Watch

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
    session.console.print(f"  {sentence(found)}", highlight=False, markup=False, soft_wrap=True)
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

"""One session of the engine: put together, run to the end, told how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from attnimg.config.schema import Config
from attnimg.errors import AttnimgError
from attnimg.facts import RunContext
from attnimg.train import metrics
from attnimg.train.arguments import Schedule, training_arguments
from attnimg.train.attention_check import AttentionCheck
from attnimg.train.checkpoint import ResumePoint
from attnimg.train.distributed import StopFlag, any_rank, lost_rank_errors
from attnimg.train.intact import damages_of
from attnimg.train.loss import LossCheck, sentence
from attnimg.train.receipt import RunFacts
from attnimg.train.resume import apply_config
from attnimg.train.rows import Rows

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

    pass  # self import

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


# transformers' name -> the name in metrics.jsonl, in the order of a line.
TRAIN_KEYS = (
    "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "filled",
    "memory_bytes", "seconds", "aux_loss", "attn_checks", "attn_margin",
)  # fmt: skip


# ruff: noqa: ARG002
# transformers calls each of these with all of its arguments, whether they are needed or not.
class Watch(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """Follow the engine: write each log, draw progress, and stop it when asked.

    Args:
        folder: output_dir, where metrics.jsonl stands.
        stop: whether someone asked to stop.
        view: the bar.
        restored: the state of the checkpoint the run goes on from; empty for a new run.
        config: the validated run if it resumes from a checkpoint; None for a new run.
        ready: called with the engine when it is ready for its first step.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stop: StopFlag,
        view: ProgressView,
        restored: Mapping[str, Any],
        config: Config | None,
        ready: Callable[[Any], None],
    ) -> None:
        self.folder, self.stop, self.view, self.restored = folder, stop, view, restored
        self.config, self.ready = config, ready
        self.stopping = False
        self.engine: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up the sums, and the evaluation, that the session before left unfinished."""
        if self.config is not None:
            apply_config(self.engine, self.config, self.restored.get("identity", {}))
        self.ready(self.engine)
        self.engine.restore_window(self.restored)
        self.view.begin(state.global_step)
        self.stop.training = True
        if self.restored.get("evaluate_first"):
            self.engine.evaluate_missed()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait for the hashes of the optimizer's state, which its step will change."""
        self.engine.hashes.settle()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar, and ask for a checkpoint when any process was told to stop."""
        self.view.step(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_log = True
        if any_rank(self.stop.number is not None):
            self.stopping = True
            # An evaluation due here is the next session's first act: the checkpoint says so.
            control.should_evaluate = False
            control.should_save = True
            # Weights alone could not be resumed from.
            args.save_only_model = False
        elif control.should_evaluate:
            self.view.evaluating()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave training once the checkpoint of a stop is in place."""
        if self.stopping:
            raise self.engine.stopped()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the log as one line, on the first process alone."""
        if "loss" in logs:
            line = {"step": state.global_step} | {k: logs[k] for k in TRAIN_KEYS if k in logs}
            self.view.figures(state.global_step, line)
        elif "eval_loss" in logs:
            line = {"step": state.global_step}
            line |= {key: logs[key] for key in ("eval_loss", "eval_aux_loss") if key in logs}
            self.view.evaluated(state.global_step, logs["eval_loss"])
        else:
            return
        if state.is_world_process_zero:
            metrics.append(self.folder, line)


# Where no bar can be drawn, a line a second is enough to see that the run lives.
SECONDS_BETWEEN_LINES = 1.0


class ProgressView:
    """Draw the run's progress on `console`, which should be stderr's.

    Args:
        console: where to draw; a bar on a terminal, plain lines elsewhere.
        total: optimizer steps of the whole run.
        visible: False on every process but the first.
    """

    def __init__(self, console: Console, *, total: int, visible: bool = True) -> None:
        self.console, self.total, self.visible = console, total, visible
        self._figures = ""
        self._last_line = float("-inf")
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not (visible and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total, figures="")

    def begin(self, step: int) -> None:
        """Start drawing at `step`, where a resumed run goes on."""
        self._bar.update(self._task, completed=step)
        self._bar.start()

    def step(self, step: int) -> None:
        """Move to `step`."""
        self._bar.update(self._task, completed=step, description="training")

    def evaluating(self) -> None:
        """Say that the model is being evaluated, so that a bar that stands still is understood."""
        self._bar.update(self._task, description="evaluating")

    def figures(self, step: int, line: Mapping[str, float]) -> None:
        """Show a training log.

        Args:
            step: optimizer steps done.
            line: loss, tokens_per_second, filled (0 to 1) and memory_bytes.
        """
        self._figures = describe(line)
        self._bar.update(self._task, figures=self._figures)
        due = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        if due or step in (1, self.total):
            self._print_line(f"step {step:>{len(str(self.total))}}/{self.total}  {self._figures}")

    def evaluated(self, step: int, loss: float) -> None:
        """Show an evaluation's loss; it stays on the screen."""
        if self.visible:
            self.console.print(
                f"step {step:>{len(str(self.total))}}/{self.total}  eval loss {loss:.4f}",
                highlight=False,
                markup=False,
            )

    def end(self) -> None:
        """Stop drawing; the last state stays."""
        self._bar.stop()

    def _print_line(self, text: str) -> None:
        if self.visible and not self.console.is_terminal:
            self._last_line = time.monotonic()
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(line: Mapping[str, float]) -> str:
    """Put a training log into words: loss, speed, filled share, memory."""
    return (
        f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tok/s  "
        f"{line['filled']:.1%} filled  {line['memory_bytes'] / 2**30:.2f} GiB"
    )

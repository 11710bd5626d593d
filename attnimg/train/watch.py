"""What happens between the engine's steps: lines of metrics, the bar, the wish to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from attnimg.config.schema import Config
from attnimg.train import metrics
from attnimg.train.distributed import any_rank
from attnimg.train.progress import ProgressView
from attnimg.train.resume import apply_config
from attnimg.train.signals import StopFlag

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

"""Report a run to wandb, mlflow and tensorboard, through transformers' own callbacks.

A tracker that fails while the model trains is a warning, and is not used any more; training
continues.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import WandbLogModel, default_logdir

from attnimg.config.schema import Config
from attnimg.errors import exception_text
from attnimg.redact import redact
from attnimg.train.distributed import Stopped
from attnimg.train.trackers import (
    active_trackers,
    mlflow_uri,
    set_environment,
    unavailable,
    wandb_mode,
)

# Seconds to upload what is left at the end of a run; with models, an hour.
_UPLOAD_S, _UPLOAD_MODELS_S = 60, 3600

_TRUE = ("1", "true", "yes", "on")


# ruff: noqa: ARG002
# transformers calls each of these with all of its arguments, whether they are needed or not.
class CheckpointCallback(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """A callback that uses checkpoints, which a thread finishes after transformers' on_save."""

    wants_checkpoints = False

    def attach(self, engine: Any) -> None:
        """Add this callback to an engine."""
        self.engine = engine
        engine.add_callback(self)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait until the checkpoint is complete, and use it."""
        if self.wants_checkpoints:
            self.engine.pending_checkpoint.wait()
            self.use_checkpoint(Path(self.engine.folder) / f"checkpoint-{state.global_step}")

    def use_checkpoint(self, checkpoint: Path) -> None:
        """Use a complete checkpoint."""
        raise NotImplementedError


class Wandb:
    """A run of Weights & Biases.

    Args:
        config: the validated run.
        folder: output_dir.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.artifacts = config.wandb_log_model or os.environ.get("WANDB_LOG_MODEL")
        self.callback = WandbCallback()
        # It would save the model of "end" again by a second Trainer, in another dtype than ours.
        self.callback._log_model = WandbLogModel.FALSE
        self.wants_checkpoints = self.artifacts == "checkpoint"

    def start(self, args: Any, state: Any, control: Any, *, model: Any, **options: Any) -> str:
        """Start or continue the run; return a line for the user."""
        import wandb

        config = self.config
        place = Path(os.environ.get("WANDB_DIR") or self.folder)
        place.mkdir(parents=True, exist_ok=True)
        uploads = self.artifacts in ("checkpoint", "end")
        self.run = wandb.init(
            project=config.wandb_project or os.environ.get("WANDB_PROJECT") or "huggingface",
            entity=config.wandb_entity,
            name=config.wandb_name or config.wandb_run_id,
            id=config.wandb_run_id,
            resume="allow" if config.wandb_run_id else None,
            mode=wandb_mode(config),
            dir=str(place),
            config={"attnimg": config.model_dump(mode="json", exclude_none=True)},
            settings=wandb.Settings(
                console=os.environ.get("WANDB_CONSOLE", "off"),
                init_timeout=30,
                finish_timeout=_UPLOAD_MODELS_S if uploads else _UPLOAD_S,
                finish_timeout_raises=True,
            ),
        )
        if self.config.wandb_watch in ("gradients", "parameters", "all"):
            # Source: transformers 5.22.2, integration_utils.py, WandbCallback.setup (2026-11-27).
            self.run.watch(
                model, log=self.config.wandb_watch, log_freq=max(100, state.logging_steps)
            )
        self.callback.on_train_begin(args, state, control, model=model, **options)
        synced = self.run.settings.sync_dir
        if wandb_mode(config) == "online":
            return f"wandb: {self.run.url}"
        return f"wandb: {synced}; upload it with `wandb sync {synced}`"

    def add_files(self, name: str, paths: Sequence[Path]) -> None:
        """Upload files as an artifact."""
        import wandb

        # Source: transformers 5.22.2, integration_utils.py, WandbCallback.on_save (2026-11-27).
        named = self.run.name if self.config.wandb_name else self.run.id
        artifact = wandb.Artifact(name=f"model-{named}", type="model")
        for path in paths:
            artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
        self.run.log_artifact(artifact, aliases=[name])

    def add_model(self, files: Sequence[Path]) -> None:
        """Upload the trained model, if the config requests it."""
        if self.artifacts in ("checkpoint", "end"):
            self.add_files("final_model", files)

    def finish(self, status: str) -> None:
        """End the run; the status is FINISHED, FAILED or KILLED."""
        self.run.finish(exit_code=0 if status == "FINISHED" else 1)


class MLflow:
    """A run of MLflow; its arguments are those of Wandb."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.callback = MLflowCallback()
        requested = os.environ.get("HF_MLFLOW_LOG_ARTIFACTS", "").lower() in _TRUE
        self.wants_checkpoints = bool(config.hf_mlflow_log_artifacts or requested)

    def start(self, args: Any, state: Any, control: Any, **options: Any) -> str:
        """Start the run, or continue that of the variable MLFLOW_RUN_ID."""
        import mlflow

        uri = mlflow_uri(self.config)
        mlflow.set_tracking_uri(uri)
        if experiment := self.config.mlflow_experiment_name:
            mlflow.set_experiment(experiment)
        run = mlflow.start_run(run_name=self.config.mlflow_run_name)
        if self.wants_checkpoints:
            mlflow.log_dict(self.config.model_dump(mode="json", exclude_none=True), "config.yaml")
        self.callback.on_train_begin(args, state, control, **options)
        # In MLflow's threads a failure would not be noticed, and delay the end by minutes.
        self.callback._async_log = False
        return f"mlflow: run {run.info.run_name} ({run.info.run_id}) in {redact(uri)}"

    def add_files(self, name: str, paths: Sequence[Path]) -> None:
        """Copy a checkpoint to the run's artifacts."""
        import mlflow

        for path in paths:
            mlflow.log_artifacts(str(path), artifact_path=name)

    def add_model(self, files: Sequence[Path]) -> None:
        """Copy nothing: the last checkpoint is copied already, as in axolotl."""

    def finish(self, status: str) -> None:
        """End the run, after all metrics are written."""
        import mlflow

        try:
            mlflow.flush_async_logging()
        finally:
            mlflow.end_run(status)


class TensorBoard:
    """Files for TensorBoard; its arguments are those of Wandb."""

    wants_checkpoints = False

    def __init__(self, config: Config, folder: Path) -> None:
        self.callback = TensorBoardCallback()
        if self.callback.logging_dir is None:  # of the variable TENSORBOARD_LOGGING_DIR
            self.callback.logging_dir = str(folder / default_logdir())

    def start(self, args: Any, state: Any, control: Any, **options: Any) -> str:
        """Open the file; return a line for the user."""
        self.callback.on_train_begin(args, state, control, **options)
        return f"tensorboard: show it with `tensorboard --logdir {self.callback.logging_dir}`"

    def add_files(self, name: str, paths: Sequence[Path]) -> None:
        """Add nothing."""

    def add_model(self, files: Sequence[Path]) -> None:
        """Add nothing."""

    def finish(self, status: str) -> None:
        """Close the file; transformers' callback does so only if training ended."""
        if self.callback.tb_writer is not None:
            self.callback.tb_writer.close()


Tracker = Wandb | MLflow | TensorBoard

_CLASSES: dict[str, type[Wandb] | type[MLflow] | type[TensorBoard]] = {
    "wandb": Wandb, "mlflow": MLflow, "tensorboard": TensorBoard,
}  # fmt: skip


class TrackerCallback(CheckpointCallback):
    """Pass the events of a run to its trackers.

    Args:
        config: the validated run.
        folder: output_dir.
        log: prints a line.
    """

    def __init__(self, config: Config, folder: Path, *, log: Callable[[str], None]) -> None:
        self.log = log
        set_environment(active_trackers(config))
        self._trackers: dict[str, Tracker] = {
            name: _CLASSES[name](config, folder) for name in active_trackers(config)
        }
        self._running: dict[str, Tracker] = {}

    @property
    def wants_checkpoints(self) -> bool:  # type: ignore[override]  # constant in other callbacks
        """Return whether a tracker copies checkpoints."""
        return any(tracker.wants_checkpoints for tracker in self._running.values())

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Start the runs.

        Raises:
            AttnimgError: a tracker does not accept a run (code tracker-unavailable, exit code 1).
        """
        # MLflow draws the name of a run from Python's generator, which training may use.
        drawn = random.getstate()
        try:
            for name, tracker in self._trackers.items():
                try:
                    self.log(tracker.start(args, state, control, **options))
                except Exception as error:
                    with suppress(Exception):
                        tracker.finish("FAILED")
                    raise unavailable(name, error, exit_code=1) from error
                self._running[name] = tracker
        finally:
            random.setstate(drawn)

    def on_log(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Report the metrics that RunCallback writes to metrics.jsonl."""
        self._each(lambda tracker: tracker.callback.on_log(args, state, control, **options))

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Report that training has ended."""
        self._each(lambda tracker: tracker.callback.on_train_end(args, state, control, **options))

    def use_checkpoint(self, checkpoint: Path) -> None:
        """Upload a checkpoint to the trackers whose config requests it."""
        self._each(
            lambda tracker: (
                tracker.add_files(checkpoint.name, [checkpoint])
                if tracker.wants_checkpoints
                else None
            )
        )

    def add_model(self, files: Sequence[Path]) -> None:
        """Upload the trained model to the trackers whose config requests it."""
        self._each(lambda tracker: tracker.add_model(files))

    @contextmanager
    def ended(self) -> Iterator[None]:
        """End the runs when the block ends, with its status."""
        status = "FINISHED"
        try:
            yield
        except BaseException as error:
            status = "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED"
            raise
        finally:
            self._each(lambda tracker: tracker.finish(status))

    def _each(self, act: Callable[[Tracker], Any]) -> None:
        """Call a function with each running tracker; stop using those for which it raises."""
        for name, tracker in list(self._running.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._running[name]
                with suppress(Exception):
                    tracker.finish("FAILED")
                text = redact(exception_text(error))
                self.log(f"warning: {name} failed and is not used any more: {text}")

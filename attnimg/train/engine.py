"""Train with one of TRL's trainers: checkpoints that survive kills, stops on signals, token counts.

Engine trains by next-token loss: the negative log-likelihood averaged over the trained tokens of a
step, on all processes. loss.py computes it; own_loss.py compares it with the model's own loss.
preferences/trainer.py has the engines of preference training.
"""

from __future__ import annotations

import functools
import gc
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from attnimg.errors import AttnimgError, set_backend
from attnimg.memory.settings import keeps_logits
from attnimg.train import checkpoint as checkpoints
from attnimg.train import records
from attnimg.train.checkpoint import FileHasher, write_errors
from attnimg.train.distributed import Stopped, any_rank
from attnimg.train.frozen import restore_after_steps
from attnimg.train.loss import LossTrainer
from attnimg.train.loss_watchdog import LossWatchdog
from attnimg.train.model_files import TRAINER_FILES, correct_saved_config
from attnimg.train.offloading import offload_activations
from attnimg.train.resume import apply_config
from attnimg.train.rows import COUNTS, EpochSampler, LengthGroupedOrder, row_lengths
from attnimg.train.saved_states import CheckpointingTrainer
from attnimg.train.schedules import cosine_factor, create_optimizer_with_rates
from attnimg.train.trackers import active_trackers

if TYPE_CHECKING:
    from attnimg.train.fit import Session

# transformers' name -> the name in metrics.jsonl, in the order of a line.
TRAIN_KEYS: tuple[str, ...] = (
    "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "filled",
    "memory_bytes", "seconds", "aux_loss", "attn_checks", "attn_margin",
)  # fmt: skip
EVAL_KEYS: tuple[str, ...] = ("eval_loss", "eval_aux_loss")


class EvaluationInterrupted(Exception):
    """Raised if a signal comes during an evaluation, which the next session then repeats."""


class RunTrainer(CheckpointingTrainer):
    """The part of an engine that does not depend on the loss; one of TRL's trainers follows it.

    Args:
        session: config, model, rows and state of the run. Its stop flag is read after each step
            and evaluation batch.
        options: arguments of TRL's trainer.

    Attributes:
        train_keys: the values of a training log that are written to metrics.jsonl.
        eval_keys: those of an evaluation's log.
        counter: counts tokens and time between two logs.
        watchdog: counts steps with a high loss.
        base_rates: the learning rate of each group of weights, without schedule.
        pending_checkpoint: the checkpoint that a thread is finishing.
        loaded_config: the model's config before training.
    """

    train_keys, eval_keys = TRAIN_KEYS, EVAL_KEYS

    def __init__(self, session: Session, **options: Any) -> None:
        self.session, self.folder, self.stop = session, session.folder, session.stop
        self.attention_check = session.attention_check
        self.counter, self.base_rates = records.TokenCounter(), list[float]()
        config = session.config
        self.watchdog = LossWatchdog(config.loss_watchdog_threshold, config.loss_watchdog_patience)
        self._evaluated_at = -1
        self.pending_checkpoint, self.hashes = checkpoints.PendingCheckpoint(), FileHasher()
        self.loaded_config = options["model"].config.to_dict()
        trained = {
            name: weight.dtype
            for name, weight in options["model"].named_parameters()
            if weight.requires_grad
        }
        super().__init__(**options)
        # TRL casts the adapter of a quantized model to bfloat16, whatever the run's precision:
        # wrong on a CPU in float32, and float16's gradient scaler can't unscale bfloat16.
        # Source: trl 1.16 sft_trainer.py, "When using QLoRA" (2026-11-21).
        for name, weight in self.model.named_parameters():
            if name in trained:
                weight.data = weight.data.to(trained[name])
        self.maybe_activation_offload_context = offload_activations(
            self.model, config, session.run.machine
        )

    def _send_telemetry(self) -> None:
        """Send nothing: TRL would report the trainer's class to the hub."""

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write no model card: TRL's names a hub repository that does not exist."""

    def get_train_dataloader(self) -> Any:
        """Return the training batches; with added rows, each other row occurs once per epoch."""
        loader = super().get_train_dataloader()
        added, config = self.session.train.added, self.session.config
        rows, seed = len(self.train_dataset) - added, self.args.data_seed
        order: SeedableRandomSampler | LengthGroupedOrder
        if config.group_by_length and not config.sample_packing:
            args = self.args
            together = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            lengths = row_lengths(self.train_dataset)[:rows].tolist()
            order = LengthGroupedOrder(lengths, together=together, seed=seed)
        elif added:
            # The order of a single process.
            order = SeedableRandomSampler(range(rows), data_seed=seed)
        else:
            return loader
        # It replaces accelerate's own sampler, so that resuming sets its epoch.
        loader.set_sampler(EpochSampler(order, rows=rows, added=added))
        return loader

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer, which keeps the rows that unfrozen_parameters freezes.

        base_rates has the learning rates that the schedule changes.
        """
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decay = set(self.get_decay_parameter_names(model))
            self.optimizer: Any = create_optimizer_with_rates(
                model, self.session.config, optimizer_class, options, decay=decay
            )
        optimizer = super().create_optimizer(model)
        self.base_rates = [float(group["lr"]) for group in optimizer.param_groups]
        restore_after_steps(self.accelerator.unwrap_model(self.model), optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the learning rate schedule: one of axolotl's own, or one of transformers."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        factor = cosine_factor(self.session.config, warmup=warmup, total=num_training_steps)
        if self.lr_scheduler is None and factor is not None:
            self.lr_scheduler: Any = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; the last checkpoint is complete when this returns or raises.

        Raises:
            AttnimgError: what training raises, or the checkpoint could not be written.
        """
        try:
            result = super().train(*args, **options)
            self.attention_check.require_unchanged(self.state.global_step, self.folder)
        except BaseException:
            with suppress(Exception):  # the first error is the one to print
                self.pending_checkpoint.wait()
            raise
        self.finish_checkpoint()
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Count the batch, then train on it.

        Raises:
            AttnimgError: an attention call is wrong, or a checkpoint could not be written.
        """
        tokens, positions = inputs.pop(COUNTS).tolist()
        self.counter.count(tokens, positions)
        step = self.state.global_step + 1
        # The error on a wrong call names the newest checkpoint.
        if self.pending_checkpoint.is_done or self.attention_check.is_due(step):
            self.pending_checkpoint.wait()
        with self.attention_check.checking(step, self.folder):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.watchdog.add(loss)
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **options: Any) -> None:
        """Log, evaluate and save; after too many steps with a high loss, only log.

        Raises:
            AttnimgError: code loss-too-high, exit code 1.
        """
        too_high = self.watchdog.count_step(
            lambda loss: self.accelerator.reduce(loss, reduction="mean")
        )
        if too_high:
            self.control.should_log = True
            self.control.should_evaluate = self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **options)
        if too_high:
            raise self._high_loss_error()

    def _high_loss_error(self) -> AttnimgError:
        self.pending_checkpoint.wait()
        newest = checkpoints.newest_checkpoint(self.folder)
        watchdog, step = self.watchdog, self.state.global_step
        first = step - watchdog.high_steps + 1
        return AttnimgError(
            f"the loss has been above loss_watchdog_threshold since step {first}",
            why=f"found loss {watchdog.loss:.3g} at step {step}; needed at most "
            f"{watchdog.threshold:g} in one of {watchdog.patience} steps in a row\n"
            + (f"the newest checkpoint is {newest}" if newest else "no checkpoint was written"),
            do="lower learning_rate or lengthen warmup_steps, and resume from a checkpoint that is "
            "older than the rise of the loss; if such losses are expected, raise "
            "loss_watchdog_threshold",
            code="loss-too-high",
            key="loss_watchdog_threshold",
            exit_code=1,
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Raise where a loss or gradient is NaN or inf, before the step changes the weights.

        Raises:
            AttnimgError: code not-finite, exit code 1.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # float16's scaler expects infinite gradients: it skips the step and lowers its scale.
        scaled = self.accelerator.scaler is not None
        finite = bool(torch.isfinite(self._tr_loss).all())
        if norm is not None and not scaled:
            finite = finite and math.isfinite(float(norm))
        if not finite:
            raise self._not_finite_error(norm)
        return norm

    def _not_finite_error(self, norm: Any) -> AttnimgError:
        step = self.state.global_step + 1
        self.pending_checkpoint.wait()
        newest = checkpoints.newest_checkpoint(self.folder)
        norm_text = f", gradient norm {float(norm):.3g}" if norm is not None else ""
        return AttnimgError(
            f"loss or gradient is NaN or inf at step {step}",
            why=f"found loss {float(self._tr_loss):.3g}{norm_text}, attention by "
            f"{self.session.run.backend}; the step was not applied\n"
            + (
                f"the newest good checkpoint is {newest}" if newest else "no checkpoint was written"
            ),
            do="lower learning_rate or lengthen warmup_steps; if it stays, "
            f"{set_backend('eager')} to rule out the attention kernel",
            code="not-finite",
            exit_code=1,
        )

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        """Evaluate; on a signal, save, and let the next session evaluate."""
        try:
            with self.counter.paused():
                result = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationInterrupted:
            self.model.train()
            self._save_checkpoint(self.model, trial)
            raise self.stop_exception() from None
        self._evaluated_at = self.state.global_step
        return result

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the evaluation batches, made by their own collator."""
        self.data_collator = (self.session.evaluation or self.session.train).collate
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self.session.train.collate

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Compute the loss of an evaluation batch.

        Raises:
            EvaluationInterrupted: a signal came.
        """
        inputs.pop(COUNTS, None)
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if any_rank(self.stop.number is not None):
            raise EvaluationInterrupted
        return result

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Return whether the loss is the lowest so far; the best model is saved for the end."""
        best: bool = super()._determine_best_metric(metrics=metrics, trial=trial)
        if best and self.session.config.load_best_model_at_end:
            self.control.should_save = True
        return best

    def evaluate_missed(self) -> None:
        """Run the evaluation that was due when the previous session was stopped."""
        self._determine_best_metric(self._evaluate(None, None), None)

    def _evaluation_due(self) -> bool:
        """Return whether an evaluation at this step is due and has not run."""
        step, every = self.state.global_step, self.state.eval_steps
        if self.eval_dataset is None or self._evaluated_at == step:
            return False
        if self.args.eval_strategy == "steps":
            return bool(step % every == 0 or step >= self.state.max_steps)
        epoch_ends = float(self.state.epoch).is_integer() or step >= self.state.max_steps
        return bool(self.args.eval_strategy == "epoch" and epoch_ends)

    def stop_exception(self) -> Stopped:
        """Return the exception for the caller to raise; the last checkpoint is complete."""
        self.finish_checkpoint()
        number, saved = self.stop.number or 15, checkpoints.newest_checkpoint(self.folder)
        return Stopped(number, step=self.state.global_step, checkpoint=saved)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens, time and memory to a training log; transformers passes it to callbacks."""
        if "loss" in logs:
            tokens, positions = self._counts()
            logs.update(self.counter.close_window(tokens=tokens, positions=positions))
            logs.update(self.attention_check.close_window())
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of unfinished checkpoints, for transformers to write to."""
        return str(self.folder / checkpoints.PARTIAL)

    def finish_checkpoint(self) -> None:
        """Wait until the previous checkpoint is complete; every process calls this.

        Raises:
            AttnimgError: it could not be written; earlier ones are unchanged.
        """
        with self.counter.paused():
            self.pending_checkpoint.wait()
            self.accelerator.wait_for_everyone()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint's files; a thread finishes it while training continues.

        Raises:
            AttnimgError: the disk is full; earlier checkpoints are unchanged.
        """
        self.finish_checkpoint()
        name = f"checkpoint-{self.state.global_step}"
        partial = self.folder / checkpoints.PARTIAL / name
        if (self.folder / name).is_dir():
            # The step was saved before its evaluation, and a signal came during that.
            return
        previous = checkpoints.newest_checkpoint(self.folder)
        best = self.folder / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        kept = f"{previous.name} is kept" if previous else "no checkpoint was written before"
        hashes = self.hashes = FileHasher()
        try:
            with self.counter.paused(), write_errors(partial, kept=kept):
                if not self.args.save_only_model:
                    self.save_optimizer(partial)
                super()._save_checkpoint(model, trial)
                self._add_run_state(partial)
        except BaseException:
            hashes.close()
            if self.is_world_process_zero():
                checkpoints.remove_leftovers(self.folder)
            raise
        if self.is_world_process_zero():
            finish = functools.partial(
                checkpoints.finish,
                partial,
                hashes,
                processes=self.args.world_size,
                limit=self.session.config.save_total_limit,
                best=best,
                kept=kept,
            )
            self.pending_checkpoint.start(finish)
        else:
            hashes.close()

    def _add_run_state(self, partial: Path) -> None:
        """Add the run's own state to a checkpoint that all processes have written."""
        self.accelerator.wait_for_everyone()
        state = self._log_window_state()
        if self.is_world_process_zero():
            correct_saved_config(partial, self.loaded_config)
            (partial / checkpoints.STATE_FILE).write_text(json.dumps(state, indent=2))
            for name in TRAINER_FILES:
                (partial / name).unlink(missing_ok=True)

    def _counts(self) -> list[int]:
        """Return the tokens and token positions of all processes since the last log."""
        counts = torch.tensor(
            [self.counter.tokens, self.counter.positions], device=self.args.device
        )
        total: list[int] = self.accelerator.reduce(counts, reduction="sum").tolist()
        return total

    def _log_window_state(self) -> dict[str, object]:
        """Return the sums since the last log, so that a resumed run logs the same loss."""
        tokens, positions = self._counts()
        loss = self.accelerator.reduce(self._tr_loss.clone(), reduction="mean").item()
        return {
            "step": self.state.global_step,
            "tokens": self.counter.total_tokens,
            "window": {"loss": loss, "from_step": self._globalstep_last_logged,
                       "tokens": tokens, "places": positions, **self.window_sums(),
                       "high_steps": self.watchdog.high_steps},
            "evaluate_first": self._evaluation_due(),
            "identity": dict(self.session.identity),
        }  # fmt: skip

    def restore_window(self, state: Mapping[str, Any]) -> None:
        """Restore the sums since the last log from a checkpoint; called when training begins."""
        window = state.get("window")
        if window is None:
            return
        self.counter.total_tokens = state["tokens"]
        self._tr_loss += window["loss"]
        self._globalstep_last_logged = window["from_step"]
        self.watchdog.high_steps = window.get("high_steps", 0)
        # The sums include all processes, so only one of them restores them.
        if self.is_world_process_zero():
            self.counter.count(window["tokens"], window["places"])
        self.restore_window_sums(window)

    def window_sums(self) -> dict[str, Any]:
        """Return the sums since the last log that only this kind of training has."""
        return {}

    def restore_window_sums(self, window: Mapping[str, Any]) -> None:
        """Restore the values of `window_sums` from a checkpoint; every process calls this."""


class Engine(RunTrainer, LossTrainer):
    """Train one run by next-token loss, with TRL's SFTTrainer."""

    def __init__(self, session: Session, **options: Any) -> None:
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        vocabulary = getattr(options["model"].config.get_text_config(), "vocab_size", None)
        super().__init__(
            session,
            small_logits=keeps_logits(session.config, vocabulary),
            # TRL's head reads the weight of the output layer, which qat rounds in the layer's call.
            own_head=session.config.qat is not None,
            with_scores=bool(active_trackers(session.config)),
            **options,
        )

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Sum the loss over trained tokens, so that it does not depend on how rows are batched."""
        trained = (inputs["labels"][..., 1:] != -100).sum()
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._eval_sums += torch.stack([result[0] * trained, trained]).double().cpu()
        return result

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Replace transformers' mean over batches with the mean over trained tokens."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **options)
        sums = self._eval_sums.float().to(self.args.device)
        loss, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        output.metrics[f"{options.get('metric_key_prefix', 'eval')}_loss"] = loss / max(tokens, 1)
        return output

    def window_sums(self) -> dict[str, Any]:
        """Return the sums of the auxiliary loss since the last log."""
        return {"aux": self.aux_window()}

    def restore_window_sums(self, window: Mapping[str, Any]) -> None:
        """Restore the sums of the auxiliary loss; they include all processes, so on one of them."""
        if self.is_world_process_zero():
            self.restore_aux_window(window.get("aux", [0, 0]))


# ruff: noqa: ARG002
# transformers calls each of these with all of its arguments, whether they are needed or not.
class RunCallback(TrainerCallback):  # type: ignore[misc]  # transformers' types are not followed
    """Write each log, draw progress, and stop the engine when a signal requests it.

    Args:
        engine: the engine that calls it.
        view: the progress bar.
        on_ready: called with the engine when it is ready for its first step.
    """

    def __init__(
        self, engine: RunTrainer, view: records.ProgressView, on_ready: Callable[[Any], None]
    ) -> None:
        self.engine, self.view, self.on_ready = engine, view, on_ready
        self.stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Restore the sums of the previous session, and run the evaluation that it missed."""
        engine, session = self.engine, self.engine.session
        if session.checkpoint is not None:
            apply_config(engine, session.config, session.restored.get("identity", {}))
        self.on_ready(engine)
        engine.restore_window(session.restored)
        self.view.start(state.global_step)
        session.stop.training = True
        if session.restored.get("evaluate_first"):
            engine.evaluate_missed()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the bar, and save a checkpoint if any process received a stop signal."""
        self.view.step(state.global_step)
        config = self.engine.session.config
        if state.global_step == 1 and config.save_first_step:
            control.should_save = True
        every = config.gc_collect_steps
        if every and (control.should_evaluate or (every > 0 and state.global_step % every == 0)):
            self._collect_garbage()
        if state.global_step >= state.max_steps:
            control.should_log = True
        if any_rank(self.engine.stop.number is not None):
            self.stopping = True
            # The next session runs an evaluation that is due here: the checkpoint records it.
            control.should_evaluate = False
            control.should_save = True
            # Weights alone could not be resumed from.
            args.save_only_model = False
        elif control.should_evaluate:
            self.view.start_evaluation()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Free memory where gc_collect_steps is set."""
        if self.engine.session.config.gc_collect_steps:
            self._collect_garbage()

    def _collect_garbage(self) -> None:
        """Free what no object refers to any more, and unused memory of the GPU.

        Source: axolotl 0.19.0, utils/callbacks/__init__.py, GCCallback (2026-11-27).
        """
        gc.collect()
        torch.cuda.empty_cache()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop training after the checkpoint of a stop is written."""
        if self.stopping:
            raise self.engine.stop_exception()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the log as one line, on the first process only."""
        if "loss" in logs:
            line = {"step": state.global_step}
            line |= {key: logs[key] for key in self.engine.train_keys if key in logs}
            self.view.show_training(state.global_step, line)
        elif "eval_loss" in logs:
            line = {"step": state.global_step}
            line |= {key: logs[key] for key in self.engine.eval_keys if key in logs}
            self.view.show_evaluation(state.global_step, logs["eval_loss"])
        else:
            return
        if state.is_world_process_zero:
            records.append_metrics(self.engine.folder, line)

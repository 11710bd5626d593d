"""Evaluate so that the loss means the same for every backend, and a signal need not wait."""

from __future__ import annotations

from typing import Any

import torch

from attnimg.train.distributed import any_rank
from attnimg.train.objective import Objective
from attnimg.train.rows import COUNTS, Collator
from attnimg.train.signals import StopFlag


class EvaluationCut(Exception):
    """A signal came while evaluating; the rest of the evaluation is left for the next session."""


class Evaluator(Objective):
    """The part of the engine that evaluates.

    Args:
        stop: whether someone asked to stop; read after each evaluation batch.
        eval_collate: the collator of evaluation batches.
        options: what SFTTrainer takes.
    """

    def __init__(self, *, stop: StopFlag, eval_collate: Collator, **options: Any) -> None:
        self.stop, self.eval_collate = stop, eval_collate
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        super().__init__(**options)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batch evaluation rows with their own collator."""
        train_collate = self.data_collator
        self.data_collator: Collator = self.eval_collate
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collate

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Sum the loss over trained tokens, so that it does not depend on how rows are batched."""
        inputs.pop(COUNTS, None)
        trained = (inputs["labels"][..., 1:] != -100).sum()
        result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self._eval_sums += torch.stack([result[0] * trained, trained]).double().cpu()
        if any_rank(self.stop.number is not None):
            raise EvaluationCut
        return result

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Replace transformers' mean over batches with the mean over trained tokens."""
        self._eval_sums = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **options)
        sums = self._eval_sums.float().to(self.args.device)
        loss, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        output.metrics[f"{options.get('metric_key_prefix', 'eval')}_loss"] = loss / max(tokens, 1)
        return output

"""Compute the loss of a step: negative log-likelihood, and the auxiliary loss of routers.

As in transformers' own forward, a mixture of experts has an auxiliary loss where its config.json
sets output_router_logits; TRL would turn it on for every model with a router_aux_loss_coef. It is
added to the minimized loss, and logged separately.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from attnimg.train.collate import NO_LOSS
from attnimg.train.own_head import with_own_head

# Names of the weight of the auxiliary loss in classes and configs.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class Objective(SFTTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """The part of the engine that computes the loss.

    Args:
        options: what SFTTrainer takes.

    Attributes:
        own_head: whether the loss is computed from the model's own logits, not by TRL's head.
        aux_coefficient: the weight of the auxiliary loss; None where the model computes none.
    """

    def __init__(self, **options: Any) -> None:
        self.own_head = False
        config = options["model"].config.get_text_config()
        asked = getattr(config, "output_router_logits", None)
        self.aux_coefficient = _coefficient(options["model"]) if asked else None
        super().__init__(**options)
        # The saved config must equal the loaded one, and the auxiliary loss is added below.
        if asked is not None:
            config.output_router_logits = asked
        self.aux_loss_enabled = False
        # transformers counts a step's trained tokens as the class's own loss would; ours is
        # divided by the step's count of shifted labels whatever the class is.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._nll = torch.zeros(())
        # Sum of the auxiliary losses since the last log, and number of batches.
        self._aux = torch.zeros(2, device=self.args.device)

    def loss_terms(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute one batch's negative log-likelihood, and its auxiliary loss without its weight.

        Args:
            model: the model, or the trainer's wrapper of it.
            inputs: a batch of the collator.
            num_items_in_batch: trained tokens of the step on all processes; None divides by those
                of the batch.
        """
        if self.aux_coefficient is not None:
            inputs["output_router_logits"] = True
        head = with_own_head(model) if self.own_head else model
        aux: list[torch.Tensor | None] = []

        def call(**arguments: Any) -> Any:
            outputs = head(**arguments)
            aux.append(outputs.aux_loss)
            return outputs

        nll = super().compute_loss(call, inputs, num_items_in_batch=num_items_in_batch)
        return nll, aux[0] if self.aux_coefficient is not None else None

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the minimized loss in training mode, the negative log-likelihood in eval mode."""
        assert not return_outputs, "the engine asks for losses only"
        labels = inputs["labels"]
        nll, aux = self.loss_terms(model, inputs, num_items_in_batch)
        self._nll = nll.detach()
        if aux is None:
            return nll
        # Several processes have equally many batches: some may have no document.
        held = (labels != NO_LOSS).any().float()
        if not self.model.training:
            found = self.accelerator.gather(torch.stack([aux.detach().float(), held])[None])
            self._metrics["eval"]["aux_loss"] += found[found[:, 1] > 0, 0].tolist()
            return nll
        aux = aux * held.to(aux.device)
        self._aux += torch.stack([aux.detach().float(), held.to(self._aux.device)])
        # Averaged over the micro-batches of a step, since it is not a sum over tokens.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return nll + self.aux_coefficient * aux.to(nll.device) / steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on a batch, and return its negative log-likelihood for the log."""
        super().training_step(model, inputs, num_items_in_batch)
        return self._nll

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean auxiliary loss of the batches since the last log."""
        if "loss" in logs and self.aux_coefficient is not None:
            total, batches = self.aux_window()
            self._aux.zero_()
            if batches:
                logs["aux_loss"] = total / batches
        super().log(logs, start_time)

    def aux_window(self) -> list[float]:
        """Return the sum and the number of the auxiliary losses of all ranks since the last log."""
        window: list[float] = self.accelerator.reduce(self._aux.clone(), reduction="sum").tolist()
        return window

    def restore_aux_window(self, window: list[float]) -> None:
        """Add the values of `aux_window` from a checkpoint."""
        self._aux += torch.tensor(window, device=self._aux.device)


def _coefficient(model: Any) -> float:
    """Return the weight of a model's auxiliary loss; 0 where neither class nor config has it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = (base, base.config.get_text_config())
    found = [getattr(holder, name, None) for holder in holders for name in COEFFICIENTS]
    return next((float(value) for value in found if value is not None), 0.0)

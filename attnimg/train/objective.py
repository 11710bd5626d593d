"""Compute what a step minimizes: negative log-likelihood, and the auxiliary loss of routers apart.

A mixture of experts has an auxiliary loss where its config.json sets output_router_logits, as in
transformers' own forward; TRL would turn it on for every model with a router_aux_loss_coef. It
takes part in the gradients and is logged as a figure of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from attnimg.train.own_head import with_own_head

# What classes and configs call the weight of their auxiliary loss.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class Objective(SFTTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """The part of the engine that computes the loss.

    Args:
        options: what SFTTrainer takes.

    Attributes:
        own_head: True to compute the loss from the model's own logits, False by TRL's chunked head.
        aux_coefficient: the weight of the auxiliary loss; None where the model is not asked for it.
    """

    def __init__(self, **options: Any) -> None:
        self.own_head = False
        config = options["model"].config.get_text_config()
        asked = getattr(config, "output_router_logits", None)
        self.aux_coefficient = _coefficient(options["model"]) if asked else None
        super().__init__(**options)
        # What is saved has the config that was loaded, and the auxiliary loss is added here.
        if asked is not None:
            config.output_router_logits = asked
        self.aux_loss_enabled = False
        # transformers counts a step's trained tokens as the class's own loss would; ours is
        # divided by the step's count of shifted labels whatever the class is.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        self._nll = torch.zeros(())
        # Sum of the auxiliary losses since the last log, and of how many batches.
        self._aux = torch.zeros(2, device=self.args.device)

    def loss_terms(
        self, model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute one batch's negative log-likelihood, and its auxiliary loss without its weight.

        Args:
            model: as the trainer wrapped it, or bare.
            inputs: what the collator made.
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
        """Return the objective while training, and the negative log-likelihood alone otherwise."""
        assert not return_outputs, "the engine asks for losses only"
        nll, aux = self.loss_terms(model, inputs, num_items_in_batch)
        self._nll = nll.detach()
        if aux is None:
            return nll
        if not self.model.training:
            mean = self.accelerator.reduce(aux.detach(), reduction="mean").item()
            self._metrics["eval"]["aux_loss"].append(mean)
            return nll
        self._aux += torch.stack([aux.detach().float(), torch.ones_like(self._aux[0])])
        # A mean over the micro-batches of a step, as it is no sum over tokens.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return nll + self.aux_coefficient * aux.to(nll.device) / steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on a batch, and return its negative log-likelihood, which is what gets logged."""
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
        """Return the sum of auxiliary losses since the last log and the batches, of all ranks."""
        window: list[float] = self.accelerator.reduce(self._aux.clone(), reduction="sum").tolist()
        return window

    def restore_aux_window(self, window: list[float]) -> None:
        """Continue the sum of `aux_window` that a checkpoint has."""
        self._aux += torch.tensor(window, device=self._aux.device)


def _coefficient(model: Any) -> float:
    """Return the weight of a model's auxiliary loss, 0 where neither class nor config names it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    holders = (base, base.config.get_text_config())
    found = [getattr(holder, name, None) for holder in holders for name in COEFFICIENTS]
    return next((float(value) for value in found if value is not None), 0.0)

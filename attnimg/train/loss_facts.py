"""Hold the results of comparing the trainer's loss with the model's own, for the receipt."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """A loss computed in one of the two ways.

    Attributes:
        nll: negative log-likelihood per trained token.
        total: the minimized loss: nll plus the weighted auxiliary loss.
        aux: the auxiliary loss without its weight; None without one.
        grad_norm: norm of the gradient of the trained weights, or of the hidden states before the
            output layer.
    """

    nll: float
    total: float
    aux: float | None
    grad_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """The largest difference due to rounding: absolute for a loss, relative for a gradient norm."""

    loss: float
    grad_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The loss by the model's own forward and by the trainer, on the same inputs.

    Attributes:
        model: the loss by the model's own forward.
        trainer: the loss by TRL's chunked head; None where that raised.
        tolerance: the allowed difference.
        raised: the error that TRL's head raised; None where it raised none.
    """

    model: Loss
    trainer: Loss | None
    tolerance: Tolerance
    raised: str | None = None

    @property
    def ratio(self) -> float:
        """Return the largest difference divided by its tolerance; inf if the trainer has none."""
        if self.trainer is None:
            return math.inf
        return difference(self.trainer, self.model, self.tolerance)

    @property
    def why(self) -> str:
        """Return how the trainer's loss differs, in words."""
        if self.trainer is None:
            return f"it raised {self.raised}"
        ours, own = self.trainer, self.model
        if abs(ours.total - own.total) > self.tolerance.loss:
            return f"its loss is {ours.total:.4f}, the model's own {own.total:.4f}"
        if abs(ours.nll - own.nll) > self.tolerance.loss:
            return f"its negative log-likelihood is {ours.nll:.4f}, the model's own {own.nll:.4f}"
        return f"its gradient norm is {ours.grad_norm:.8g}, the model's own {own.grad_norm:.8g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class LossCheck:
    """How a run computes its loss, and why.

    Attributes:
        head: "chunked" (TRL's head) or "own" (the model's own logits).
        compared: whether the losses were compared.
        why: why they were not compared, or why the head is "own"; empty otherwise.
        tokens: number of trained tokens in the compared batch.
        on_data: the comparison on that batch, in the run's precision.
        output_layer: the comparison of the output layer alone, in float32, on large hidden states;
            None where the class can't be called that way.
        own_head: the loss on the batch by the model's own logits, where the run uses them.
        own_loss_raised: the error that the model's own loss raised, so that only its logits were
            compared; None where it raised none.
        aux_coefficient: weight of the auxiliary loss; None where the model has none.
        seconds: duration of the comparison.
    """

    head: str = "chunked"
    compared: bool = True
    why: str = ""
    tokens: int = 0
    on_data: Comparison | None = None
    output_layer: Comparison | None = None
    own_head: Loss | None = None
    own_loss_raised: str | None = None
    aux_coefficient: float | None = None
    seconds: float = 0.0

    @property
    def ratio(self) -> float:
        """Return the largest difference divided by its tolerance; 0 where nothing was compared."""
        made = [found for found in (self.on_data, self.output_layer) if found is not None]
        return max((found.ratio for found in made), default=0.0)


def difference(a: Loss, b: Loss, tolerance: Tolerance) -> float:
    """Return the largest difference of two losses divided by its tolerance.

    It is inf where `a` has NaN or inf. A gradient norm of `b` that overflowed is not compared.
    """
    found = [abs(a.nll - b.nll) / tolerance.loss, abs(a.total - b.total) / tolerance.loss]
    if math.isfinite(b.grad_norm):
        allowed = max(tolerance.grad_norm * b.grad_norm, 1e-30)
        found.append(abs(a.grad_norm - b.grad_norm) / allowed)
    return max(value if math.isfinite(value) else math.inf for value in found)


def sentence(check: LossCheck) -> str:
    """Return the line that a run prints on the comparison."""
    if not check.compared:
        return f"warning: loss: not compared with the model's own: {check.why}"
    raised = ""
    if check.own_loss_raised:
        raised = f"; compared by its logits, since its own loss raised {check.own_loss_raised}"
    if check.head == "own":
        return (
            f"warning: loss: TRL's chunked head is not used: {check.why}; the loss is computed "
            f"from the model's own logits, which takes more memory{raised}"
        )
    assert check.on_data is not None
    return (
        f"{'warning: ' if raised else ''}loss: the trainer's loss equals the model's own on "
        f"{check.tokens} tokens ({check.seconds:.1f} s)"
        + ("" if check.output_layer else "; its output layer alone could not be compared")
        + raised
    )

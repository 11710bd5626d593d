"""Compute the loss of a training step, and bound the difference of two such losses.

It is computed from the model's own logits where they are small, otherwise by TRL's chunked head;
own_loss.py compares it with the model's own loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from trl import SFTTrainer

from attnimg.application import inner_model
from attnimg.memory.settings import SMALL_LOGITS
from attnimg.train.rows import NO_LOSS, Batch, CountingCollator, Rows

if TYPE_CHECKING:
    pass

# Names of the weight of the auxiliary loss in classes and configs.
AUX_LOSS_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


class LossTrainer(SFTTrainer):  # type: ignore[misc]  # TRL's types are not followed
    """The part of the engine that computes the loss.

    Args:
        small_logits: whether the logits of every batch are small, so that they are kept.
        own_head: whether the model's own logits are needed though they may be large.
        with_scores: whether entropy and accuracy are computed from small logits, for trackers.
        options: arguments of SFTTrainer.

    Attributes:
        own_head: whether the loss is computed from the model's own logits, not by TRL's head.
        small_logits: as in the arguments.
        with_scores: as in the arguments.
        aux_coefficient: the weight of the auxiliary loss; None where the model computes none.
        observe: called with each batch and the output of the head; None where nothing is observed.
    """

    def __init__(
        self, *, small_logits: bool, own_head: bool, with_scores: bool, **options: Any
    ) -> None:
        self.small_logits, self.own_head = small_logits, small_logits or own_head
        self.with_scores = with_scores
        self.observe: Callable[[Any, Any], None] | None = None
        config = options["model"].config.get_text_config()
        requested = getattr(config, "output_router_logits", None)
        self.aux_coefficient = aux_loss_coefficient(options["model"]) if requested else None
        super().__init__(**options)
        # The saved config must equal the loaded one, and the auxiliary loss is added below.
        if requested is not None:
            config.output_router_logits = requested
        self.aux_loss_enabled = False
        # transformers counts a step's trained tokens as the model class's own loss does; the loss
        # here is always divided by the number of shifted labels in the step.
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
        score = (
            score_tokens if not self.small_logits else _score if self.with_scores else _log_probs
        )
        head = use_model_head(model, score) if self.own_head else model
        aux: list[torch.Tensor | None] = []

        def call(**arguments: Any) -> Any:
            outputs = head(**arguments)
            aux.append(outputs.aux_loss)
            if self.observe is not None:
                self.observe(inputs, outputs)
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
        # All processes have the same number of batches: some may have no document.
        has_labels = (labels != NO_LOSS).any().float()
        if not self.model.training:
            found = self.accelerator.gather(torch.stack([aux.detach().float(), has_labels])[None])
            self._metrics["eval"]["aux_loss"] += found[found[:, 1] > 0, 0].tolist()
            return nll
        aux = aux * has_labels.to(aux.device)
        self._aux += torch.stack([aux.detach().float(), has_labels.to(self._aux.device)])
        # Averaged over the micro-batches of a step, since it is not a sum over tokens.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return nll + self.aux_coefficient * aux.to(nll.device) / steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Train on a batch, and return its negative log-likelihood for the log."""
        super().training_step(model, inputs, num_items_in_batch)
        return self._nll

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean auxiliary loss of the batches since the last log."""
        if self.small_logits and not self.with_scores:
            for name in SCORES:
                self._metrics["train" if self.model.training else "eval"].pop(name, None)
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


def aux_loss_coefficient(model: Any) -> float:
    """Return the weight of a model's auxiliary loss; 0 where neither class nor config has it."""
    base = inner_model(model)
    holders = (base, base.config.get_text_config())
    found = [getattr(holder, name, None) for holder in holders for name in AUX_LOSS_COEFFICIENTS]
    return next((float(value) for value in found if value is not None), 0.0)


# TRL's values of the tokens in a log, which only trackers get.
SCORES = ("entropy", "mean_token_accuracy")
# Tokens whose float32 log-probabilities are in memory at once.
CHUNK = 1024


# Log-probability, entropy, and whether the target is the most likely token, (B, S) each.
Scores = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def use_model_head(
    model: Any, score: Callable[[torch.Tensor, torch.Tensor], Scores]
) -> Callable[..., Any]:
    """Return a function that is called like a model with TRL's head, and uses the model's own head.

    Args:
        model: a causal language model, also one wrapped by PEFT, DDP or torch.compile.
        score: returns the scores of logits (B, S, V) and targets (B, S), as score_tokens does.

    Returns:
        A function of the model's arguments, labels and fused_lm_head; it returns TRL's
        FusedCausalLMOutput without `loss`, which the trainer computes from `log_probs`.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    def call(*, labels: torch.Tensor, fused_lm_head: bool, **arguments: Any) -> Any:
        assert fused_lm_head
        outputs = model(**arguments)
        targets = shift_labels(labels)
        log_probs, entropy, is_top1 = score(outputs.logits, targets)
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=targets != NO_LOSS,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return call


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, int64 (B, S); -100 for the last one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LOSS)


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Return log-probability, entropy and whether the target is the most likely token, (B, S) each.

    Args:
        logits: (B, S, V) in any precision; everything is computed in float32.
        targets: int64 (B, S); where it is -100, all three are zero.
    """
    from torch.utils.checkpoint import checkpoint

    vocabulary = logits.shape[-1]
    parts = zip(
        logits.reshape(-1, vocabulary).split(CHUNK), targets.reshape(-1).split(CHUNK), strict=True
    )
    # The backward pass recomputes a chunk's float32 values, so that only the logits are kept.
    found = [checkpoint(_score, *part, use_reentrant=False) for part in parts]
    log_probs, entropy, is_top1 = (torch.cat(values).view(targets.shape)
                                   for values in zip(*found, strict=True))  # fmt: skip
    return log_probs, entropy, is_top1


def _score(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Return what score_tokens returns, with all intermediate tensors in memory at once."""
    has_loss = targets != NO_LOSS
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    with torch.no_grad():
        entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        is_top1 = (log_probs.argmax(-1) == targets) & has_loss
    return chosen.masked_fill(~has_loss, 0), entropy.masked_fill(~has_loss, 0), is_top1


def _log_probs(logits: torch.Tensor, targets: torch.Tensor) -> Scores:
    """Return what score_tokens returns, with zeros in place of all but the log-probabilities."""
    flat = logits.float().flatten(0, -2)
    found = -torch.nn.functional.cross_entropy(
        flat, targets.flatten(), ignore_index=NO_LOSS, reduction="none"
    ).view(targets.shape)
    return found, torch.zeros_like(found), torch.zeros_like(targets, dtype=torch.bool)


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
        small_logits: whether the model's own logits are used because they are small.
        compared: whether the losses were compared.
        why: why they were not compared, or why TRL's head can't be used; empty otherwise.
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
    small_logits: bool = False
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
        comparisons = (self.on_data, self.output_layer)
        return max((found.ratio for found in comparisons if found is not None), default=0.0)


def difference(a: Loss, b: Loss, tolerance: Tolerance) -> float:
    """Return the largest difference of two losses divided by its tolerance.

    It is inf where `a` has NaN or inf. A gradient norm of `b` that overflowed is not compared.
    """
    ratios = [abs(a.nll - b.nll) / tolerance.loss, abs(a.total - b.total) / tolerance.loss]
    if math.isfinite(b.grad_norm):
        allowed = max(tolerance.grad_norm * b.grad_norm, 1e-30)
        ratios.append(abs(a.grad_norm - b.grad_norm) / allowed)
    return max(value if math.isfinite(value) else math.inf for value in ratios)


def loss_check_text(check: LossCheck) -> str:
    """Return the line that a run prints on the comparison."""
    if not check.compared:
        return f"warning: loss: not compared with the model's own: {check.why}"
    raised = ""
    if check.own_loss_raised:
        raised = f"; compared by its logits, since its own loss raised {check.own_loss_raised}"
    if check.head == "own" and not check.small_logits and check.why:
        return (
            f"warning: loss: TRL's chunked head is not used: {check.why}; the loss is computed "
            f"from the model's own logits, which needs more memory{raised}"
        )
    assert check.on_data is not None
    return (
        f"{'warning: ' if raised else ''}loss: the trainer's loss equals the model's own on "
        f"{check.tokens} tokens ({check.seconds:.1f} s)"
        + (
            ""
            if check.output_layer or check.head == "own"
            else "; its output layer alone could not be compared"
        )
        + raised
    )


ROUNDINGS = 6

SIGMAS = 8.0


def loss_tolerance(
    logits: torch.Tensor, targets: torch.Tensor, *, loss: float, precision: str
) -> Tolerance:
    """Return the largest differences that rounding explains.

    Args:
        logits: (B, S, V), of the model's own forward.
        targets: int64 (B, S), the label that each position predicts or -100.
        loss: negative log-likelihood per trained token.
        precision: the run's dtype; the dtype of the logits is used where it is coarser.
    """
    u32 = torch.finfo(torch.float32).eps / 2
    u = max(torch.finfo(dtype).eps / 2 for dtype in (getattr(torch, precision), logits.dtype))
    trained = targets != NO_LOSS
    z = logits[trained].float()
    weight = z.softmax(-1)
    weight[torch.arange(len(z), device=z.device), targets[trained]] -= 1
    # Rounding errors of a dot product are relative to its terms, which a small logit hides.
    size = z.square() + z.square().mean(-1, keepdim=True)
    variance = (weight.square() * size).sum().item() * ROUNDINGS * u**2 / 3
    sums = math.sqrt(z.shape[-1]) * u32
    return Tolerance(
        loss=SIGMAS * (math.sqrt(variance) / max(len(z), 1) + sums * max(abs(loss), 1.0)),
        grad_norm=SIGMAS * (math.sqrt(2 * ROUNDINGS / 3) * u + sums),
    )


MAX_TOKENS = 512

MAX_DOCUMENTS = 16

# Rows that are searched for documents with a trained token.
SEARCHED_ROWS = 64

# Tokens kept before the first trained token of a cut document.
CONTEXT_TOKENS = 8


def batch_tokens(vocabulary: int) -> int:
    """Return the largest number of tokens of the batch, padding included."""
    return max(32, min(MAX_TOKENS, SMALL_LOGITS // (4 * vocabulary)))


def first_batch(rows: Rows, *, tokens: int) -> Batch | None:
    """Collate the first documents that have a trained token; None where there are none.

    Documents are cut to half of the tokens, so that a packed row has two or more.

    Args:
        rows: the training rows.
        tokens: the largest number of tokens, padding included.
    """
    documents: list[dict[str, Any]] = []
    for document in _documents(rows):
        cut = _truncate(document, tokens // 2)
        longest = max(len(item["input_ids"]) for item in [*documents, cut])
        if (len(documents) + 1) * longest > tokens or len(documents) == MAX_DOCUMENTS:
            break
        documents.append(cut)
    if not documents:
        return None
    if "document_lengths" in rows.dataset.column_names:
        documents = [
            {
                "input_ids": [token for item in documents for token in item["input_ids"]],
                "labels": [label for item in documents for label in item["labels"]],
                "document_lengths": [len(item["input_ids"]) for item in documents],
            }
        ]
    # Padded to the longest document only.
    return CountingCollator(replace(rows.collate.collate, pad_to=None), capacity=None)(documents)


def _documents(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the documents of the first rows that have a trained token."""
    for index in range(min(SEARCHED_ROWS, len(rows.dataset))):
        row = rows.dataset[index]
        begin = 0
        for length in row.get("document_lengths") or [len(row["input_ids"])]:
            part = slice(begin, begin + length)
            begin += length
            document = {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}
            if any(label != NO_LOSS for label in document["labels"][1:]):
                yield document


def _truncate(document: dict[str, Any], length: int) -> dict[str, Any]:
    """Cut a document to `length` tokens, starting shortly before its first trained one."""
    first = next(i for i, label in enumerate(document["labels"]) if i and label != NO_LOSS)
    begin = max(0, min(first - CONTEXT_TOKENS, len(document["labels"]) - length))
    return {name: values[begin : begin + length] for name, values in document.items()}

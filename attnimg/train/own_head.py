"""Compute per-token losses from the logits of the model's own forward pass.

TRL's chunked head multiplies the last hidden states with the output weights itself, so it knows
only the scales and caps that it finds in the config (trl 1.16, trainer/utils.py,
add_fused_lm_head, 2026-11-27). The losses computed here are right for any class, and need the
memory of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attnimg.train.collate import NO_LOSS

if TYPE_CHECKING:
    import torch

# Tokens whose float32 log-probabilities are held at once.
CHUNK = 1024


def with_own_head(model: Any) -> Callable[..., Any]:
    """Return a function that is called like a model with TRL's head, and uses the model's own head.

    Args:
        model: a causal language model, also one wrapped by PEFT, DDP or torch.compile.

    Returns:
        A function of the model's arguments, labels and fused_lm_head; it returns TRL's
        FusedCausalLMOutput without `loss`, which the trainer computes from `log_probs`.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    def call(*, labels: torch.Tensor, fused_lm_head: bool, **arguments: Any) -> Any:
        assert fused_lm_head
        outputs = model(**arguments)
        targets = shifted(labels)
        log_probs, entropy, is_top1 = score(outputs.logits, targets)
        return FusedCausalLMOutput(
            log_probs=log_probs,
            entropy=entropy,
            is_top1=is_top1,
            label_mask=targets != NO_LOSS,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return call


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return the label that each position predicts, int64 (B, S); -100 for the last one."""
    import torch

    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LOSS)


def score(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability, entropy and whether the target is the most likely token, (B, S) each.

    Args:
        logits: (B, S, V) in any precision; everything is computed in float32.
        targets: int64 (B, S); where it is -100, all three are zero.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    vocabulary = logits.shape[-1]
    parts = zip(
        logits.reshape(-1, vocabulary).split(CHUNK), targets.reshape(-1).split(CHUNK), strict=True
    )
    # The backward pass recomputes a chunk's float32 values, so that only the logits are kept.
    found = [checkpoint(_score_chunk, *part, use_reentrant=False) for part in parts]
    log_probs, entropy, is_top1 = (torch.cat(values).view(targets.shape)
                                   for values in zip(*found, strict=True))  # fmt: skip
    return log_probs, entropy, is_top1


def _score_chunk(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    has_loss = targets != NO_LOSS
    log_probs = logits.float().log_softmax(-1)
    chosen = log_probs.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    with torch.no_grad():
        entropy = torch.special.entr(log_probs.exp()).sum(-1)
        is_top1 = (log_probs.argmax(-1) == targets) & has_loss
    return chosen.masked_fill(~has_loss, 0), entropy.masked_fill(~has_loss, 0), is_top1

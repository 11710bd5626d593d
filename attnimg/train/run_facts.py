"""What a run knows before its first step, and what it tells after its last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attnimg.facts import Machine, Plan, Proof, RunContext


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What the steps before training found out.

    Attributes:
        machine: where the run happens.
        plan: the attention choice with every reason.
        implementation: what transformers was told, "sdpa" or "kernels-community/flash-attn2".
        context: how the model is called, as it was proven.
        isolation: figures of the packing proof; None when nothing is packed.
        proofs: of the attention kernels, failed ones included.
        kernels: backend -> hashes of the files that compute it, by their kind, such as "torch";
            None where some are unknown.
    """

    machine: Machine
    plan: Plan
    implementation: str
    context: RunContext
    isolation: Mapping[str, object] | None = None
    proofs: tuple[Proof, ...] = ()
    kernels: Mapping[str, Mapping[str, str] | None] = field(default_factory=dict)

    @property
    def backend(self) -> str:
        """Name the backend people know it by."""
        return self.plan.chosen.backend.name if self.plan.chosen else self.implementation


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """How the run ended.

    Attributes:
        steps: optimizer steps the model has behind it, those of earlier sessions included.
        loss: of the last logged window of steps; None when no step was left to train.
        eval_loss: of the last evaluation, per trained token; None without one.
        aux_loss: the auxiliary loss of a mixture of experts in that window, without its weight;
            None where the model computes none.
        tokens: real tokens seen, padding left out, earlier sessions included.
        seconds: wall time of this session.
        files: what was written, in the order a person looks for it.
        resumed_from: the checkpoint it went on from.
        notes: sentences a person should read, such as an early stop.
    """

    steps: int
    loss: float | None
    eval_loss: float | None
    aux_loss: float | None
    tokens: int
    seconds: float
    files: tuple[Path, ...]
    resumed_from: Path | None
    notes: tuple[str, ...] = ()

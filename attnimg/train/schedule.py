"""Turn "twice an epoch" into steps: when a run logs, evaluates and saves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnimg.config.schema import Config, Strategy


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The run counted in optimizer steps.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the rows.
        total_steps: of the whole run.
        eval_strategy: when it evaluates.
        eval_steps: how often, with strategy "steps".
        save_strategy: when it saves.
        save_steps: how often, with strategy "steps".
    """

    steps_per_epoch: int
    total_steps: int
    eval_strategy: Strategy
    eval_steps: int | None
    save_strategy: Strategy
    save_steps: int | None


def plan_steps(config: Config, *, rows: int, world: int, validation: bool) -> Schedule:
    """Count the run in steps, the way transformers counts them.

    Args:
        config: the validated run.
        rows: packed rows, or documents when nothing is packed.
        world: processes that share the rows.
        validation: whether there is something to evaluate on.
    """
    batches = math.ceil(rows / (config.micro_batch_size * world))
    per_epoch = max(1, math.ceil(batches / config.gradient_accumulation_steps))
    total = config.max_steps or math.ceil(config.num_epochs * per_epoch)
    evaluate, eval_steps = _when(
        config.eval_strategy, config.eval_steps, config.evals_per_epoch, per_epoch=per_epoch
    )
    save, save_steps = _when(
        config.save_strategy, config.save_steps, config.saves_per_epoch, per_epoch=per_epoch
    )
    return Schedule(
        steps_per_epoch=per_epoch,
        total_steps=total,
        eval_strategy=evaluate if validation else "no",
        eval_steps=eval_steps if validation else None,
        save_strategy=save,
        save_steps=save_steps,
    )


def _when(
    strategy: Strategy | None, every: int | None, times: int | None, *, per_epoch: int
) -> tuple[Strategy, int | None]:
    """Decide between steps and epochs; without any word, once an epoch, as axolotl does."""
    if every or times:
        return "steps", every or max(1, math.ceil(per_epoch / (times or 1)))
    if strategy == "steps":
        return "steps", max(1, math.ceil(per_epoch / 4))
    return strategy or "epoch", None

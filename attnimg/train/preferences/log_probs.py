"""Compare the log-probabilities of TRL's head with the model's own, before the first step.

DPO and KTO compute their losses only from these log-probabilities. They are compared as the
next-token loss is: on the first prompts and answers, and in the output layer.
"""

from __future__ import annotations

from typing import Any

from attnimg.errors import AttnimgError
from attnimg.run_facts import RunContext
from attnimg.train.loss import SEARCHED_ROWS, LossCheck
from attnimg.train.own_loss import check_loss
from attnimg.train.preferences.data import split_row
from attnimg.train.rows import NO_LOSS, CountingCollator, PaddedCollator, Rows


def check_log_probs(
    engine: Any, rows: Rows, *, context: RunContext, pad_token_id: int
) -> LossCheck:
    """Compare the log-probabilities on the first rows; every process calls this.

    Args:
        engine: the engine before training.
        rows: the training rows.
        context: how the run calls the model.
        pad_token_id: the token of padding.

    Raises:
        AttnimgError: they differ (loss-differs), or the model raises (model-raised); exit code 1.
    """
    from datasets import Dataset

    if engine.session.config.rl == "orpo":
        return LossCheck(head="own", compared=False)
    documents = []
    for example in rows.dataset.select(range(min(SEARCHED_ROWS, len(rows.dataset)))):
        row = split_row(example)
        documents += [
            {"input_ids": row.prompt + answer, "labels": [NO_LOSS] * len(row.prompt) + answer}
            for answer in row.answers
        ]
    collate = CountingCollator(PaddedCollator(pad_token_id=pad_token_id), capacity=None)
    texts = Rows(dataset=Dataset.from_list(documents), collate=collate, figures={})
    found = check_loss(engine, texts, context=context, sharded=False)
    if found.head == "own":
        raise AttnimgError(
            "TRL's head does not compute the log-probabilities of this model",
            why=f"found on the model's first records: {found.why}\nneeded the log-probabilities of "
            "the model's own logits, which the losses of dpo and kto need",
            do="set rl: orpo, which reads the model's own logits, or choose another base_model",
            code="loss-differs",
            key="rl",
            exit_code=1,
        )
    return found


def log_probs_text(check: LossCheck) -> str:
    """Return the line that a run prints on the comparison."""
    if check.head == "own":
        return "loss: computed by TRL's ORPO from the model's own logits"
    if not check.compared:
        return f"warning: log-probabilities: not compared with the model's own: {check.why}"
    return (
        f"loss: the log-probabilities of TRL's head equal the model's own on {check.tokens} tokens "
        f"({check.seconds:.1f} s)"
    )

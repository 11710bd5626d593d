"""Build the run context: precision, packing and batch shape of the calls that a run makes.

The kernel's proof, the isolation check on the real model and the trainer all use this value, so
that the proof makes the same calls as training.
"""

from __future__ import annotations

from attnimg.facts import Backend
from attnimg.run_facts import Problem, RunContext


def build_context(problem: Problem, backend: Backend) -> RunContext:
    """Return the context of a run whose attention is computed by `backend`."""
    model = problem.model
    return RunContext(
        dtype=problem.dtype,
        autocast=problem.dtype if problem.autocast else None,
        packing=problem.packing,
        padding_free=is_padding_free(backend),
        rows=problem.rows,
        sequence_len=problem.sequence_len,
        compiled=problem.compiled,
        checkpointing=problem.checkpointing,
        seq_idx=problem.packing and model is not None and bool(model.other_layers),
    )


def is_padding_free(backend: Backend) -> bool:
    """Return whether the rows of a batch are flattened into one, with cu_seqlens.

    An unreviewed hub kernel gets cu_seqlens too; the isolation check tests whether it uses them.
    """
    return backend.packing == "native" or backend.unreviewed


def describe_context(context: RunContext) -> str:
    """Return a description of the context for a log line."""
    layout = "one document per row"
    if context.packing:
        kept_apart = "cu_seqlens" if context.padding_free else "the attention mask"
        layout = f"packed documents, isolated by {kept_apart}"
    parts = [
        f"{layout}, up to {context.rows} x {context.sequence_len} tokens",
        context.dtype + (" autocast" if context.autocast else ""),
        "torch.compile" if context.compiled else "",
        "gradient checkpointing" if context.checkpointing else "",
    ]
    return "; ".join(part for part in parts if part)

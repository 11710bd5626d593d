"""Make the run context: how one backend is called in a run.

The kernel's proof, the isolation check on the real model and the trainer each get this value, so
that what is proven is what is trained.
"""

from __future__ import annotations

from attnimg.facts import Backend, Problem, RunContext


def context_of(problem: Problem, backend: Backend) -> RunContext:
    """Return how a run calls its model when `backend` computes its attention."""
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

    A hub kernel that nobody here has read gets cu_seqlens too, and must prove that it uses them.
    """
    return backend.packing == "native" or backend.unreviewed


def described(context: RunContext) -> str:
    """Describe how a run calls its model, for a log line."""
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
